"""Measures a whole system on held-out data: per domain, what the plain base, the router's choice, the right adapter and
the worst adapter give. Uses the engine and the mixed batch that serve, not those of training.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cluster.config import EngineSettings
from cluster.engine.engine import Engine
from cluster.errors import InvalidData
from cluster.lora.catalog import Catalog
from cluster.lora.linear import attach_mixed_batch
from cluster.lora.weights import AdapterWeights
from cluster.messages import (
    NONE_DOMAIN,
    AdapterRef,
    FinishReason,
    GenerateRequest,
    Mixture,
    RoutingDecision,
    SamplingParams,
)
from cluster.model.base import Base, as_question
from cluster.training.artifacts import published_adapter, published_base, published_router, require_adapters
from cluster.training.data import Row, collate, encode, read_data
from cluster.training.language_model import summed_loss
from cluster.training.run import Run
from cluster.training.stage_adapters import padding_id
from cluster.training.stage_router import chosen_domain

_ROWS_PER_BATCH = 8
_CHECKABLE_CHARACTERS = 64
"""Answers up to this length are compared word for word; longer ones have no single right wording."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean loss in nats per token of the right answers."""

    base: float
    routed: float
    oracle: float
    """Through the labelled domain's adapter."""
    worst: float
    """Through the adapter that does worst, measured on the first rows only."""
    worst_adapter: str
    strange: float
    """Through what the router chooses without knowing the domain: its prompts then belong to none of those it knows."""

    @property
    def regret(self) -> float:
        """In domain: what routing costs beside the domain's own adapter. Below 0 where a mixture is the better one."""
        return self.routed - self.oracle

    @property
    def strange_regret(self) -> float:
        """Out of domain: what routing costs beside the plain base. Below 0 where other domains' adapters help."""
        return self.strange - self.base


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """Share of greedy answers that are the right ones, letter by letter."""

    base: float
    routed: float
    oracle: float
    wrong: float
    """Through one adapter of another domain."""
    wrong_adapter: str


@dataclass(frozen=True, slots=True)
class DomainReport:
    """What was measured of one domain; `exact_match` only where answers are short enough to have one wording."""

    rows: int
    routed_right: float
    """Share whose heaviest domain is the right one."""
    abstained: float
    """Share sent to the plain base."""
    strange_abstained: float
    """The same by a router that does not know the domain."""
    loss: Losses
    exact_match: ExactMatch | None


@dataclass(frozen=True, slots=True)
class Report:
    """The measurements of a system at one generation of its catalog."""

    generation: int
    split: str
    domains: dict[str, DomainReport]
    none_rows: int
    none_abstained: float | None
    """Share of the prompts of no domain that were sent to the plain base."""

    def as_json(self) -> dict[str, object]:
        """For `json.dump`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How much is measured."""

    root: Path
    data: Path
    split: str = "test"
    rows_per_domain: int = 100
    worst_rows: int = 24
    """Rows per domain that go through every adapter to find the worst."""
    max_tokens: int = 384


def evaluate(settings: EvaluationSettings, run: Run) -> Report:
    """Measure the system in `settings.root` on one split of the data."""
    data = read_data(settings.data)
    state = Catalog(settings.root).load()
    require_adapters(settings.root, state)
    judge = _Judge(published_base(settings.root, state), settings)
    router = published_router(settings.root, state)
    for domain in state.adapters:
        judge.adapters[state.ref(domain)] = published_adapter(settings.root, state.ref(domain))
    domains = [name for name in data.domains if name in state.adapters and data.rows(settings.split, name)]
    if not domains:
        raise InvalidData(f"{settings.data} has no {settings.split} rows of {', '.join(sorted(state.adapters))}.")
    run.start("evaluation", len(domains))
    reports = {}
    for index, domain in enumerate(domains):
        rows = data.rows(settings.split, domain, settings.rows_per_domain)
        prompts = [row.routed_prompt for row in rows]
        stranger = router.without_domain(domain) if domain in router.domains else router
        decisions = router.route(prompts), stranger.route(prompts)
        others = [state.ref(name) for name in sorted(state.adapters) if name != domain]
        reports[domain] = judge.domain(rows, *decisions, {n: state.ref(n) for n in state.adapters}, others, index)
        run.report(index + 1, {})
    none_rows = data.rows(settings.split, NONE_DOMAIN)
    none = [not decision.weights for decision in router.route([row.routed_prompt for row in none_rows])]
    return Report(state.generation, settings.split, reports, len(none), sum(none) / len(none) if none else None)


class _Judge:
    """Losses and answers of a base under given mixtures."""

    def __init__(self, base: Base, settings: EvaluationSettings) -> None:
        self._base, self._settings = base, settings
        self.adapters: dict[AdapterRef, AdapterWeights] = {}
        # The engine takes its model over, so losses have one of their own.
        self._model = copy.deepcopy(base.model)
        self._mixed_batch = attach_mixed_batch(self._model)
        self._engine = Engine(base, EngineSettings(max_batch_size=64, max_waiting=100_000, adapter_bytes=2**40))

    def domain(
        self,
        rows: Sequence[Row],
        decisions: Sequence[RoutingDecision],
        strange_decisions: Sequence[RoutingDecision],
        refs: dict[str, AdapterRef],
        others: list[AdapterRef],
        index: int,
    ) -> DomainReport:
        domain = rows[0].domain
        routed, strange = (
            [Mixture.of({refs[name]: w for name, w in d.weights.items() if name in refs}) for d in some]
            for some in (decisions, strange_decisions)
        )
        oracle = [Mixture.of({refs[domain]: 1.0})] * len(rows)
        plain = [Mixture()] * len(rows)
        heaviest = [chosen_domain(decision) for decision in decisions]
        few = rows[: self._settings.worst_rows]
        losses = {ref.domain: self.loss(few, [Mixture.of({ref: 1.0})] * len(few)) for ref in (refs[domain], *others)}
        worst = max(losses, key=lambda name: losses[name])
        base, by_router, by_oracle, by_strange = (self.loss(rows, m) for m in (plain, routed, oracle, strange))
        loss = Losses(base, by_router, by_oracle, losses[worst], worst, by_strange)
        exact = None
        if others and max(len(row.response) for row in rows) <= _CHECKABLE_CHARACTERS:
            wrong = others[index % len(others)]
            exact = ExactMatch(
                self.exact_match(rows, plain),
                self.exact_match(rows, routed),
                self.exact_match(rows, oracle),
                self.exact_match(rows, [Mixture.of({wrong: 1.0})] * len(rows)),
                wrong.domain,
            )
        right = sum(name == domain for name in heaviest) / len(rows)
        abstained, strange_abstained = (
            sum(not d.weights for d in some) / len(rows) for some in (decisions, strange_decisions)
        )
        return DomainReport(len(rows), right, abstained, strange_abstained, loss, exact)

    @torch.inference_mode()
    def loss(self, rows: Sequence[Row], mixtures: Sequence[Mixture]) -> float:
        """Mean loss per response token, each row through its own mixture."""
        examples = encode(self._base.tokenizer, rows, self._settings.max_tokens)
        order = sorted(range(len(rows)), key=lambda i: len(examples[i].ids))
        nats, labels = 0.0, 0
        for start in range(0, len(order), _ROWS_PER_BATCH):
            chosen = order[start : start + _ROWS_PER_BATCH]
            batch = collate([[examples[i]] for i in chosen], padding_id(self._base.tokenizer), learn_prompts=False)
            lengths = [batch.ids_BT.shape[1]] * len(chosen)
            self._mixed_batch.set_rows([mixtures[i] for i in chosen], lengths, self.adapters)
            nats += summed_loss(self._model, batch)
            labels += batch.num_labels
        return nats / labels if labels else math.nan

    def exact_match(self, rows: Sequence[Row], mixtures: Sequence[Mixture]) -> float:
        """Share of rows that the engine answers word for word."""
        for ref in {ref for mixture in mixtures for ref in mixture.refs} - set(self._engine.stats().resident_adapters):
            self._engine.add_adapter(ref, self.adapters[ref])
        asked = as_question(self._base.tokenizer)
        for number, (row, mixture) in enumerate(zip(rows, mixtures, strict=True)):
            request = GenerateRequest(
                str(number), asked(row.prompt), mixture, SamplingParams(max_tokens=_CHECKABLE_CHARACTERS)
            )
            self._engine.submit(request)
        texts = dict.fromkeys(range(len(rows)), "")
        ended = set()
        while self._engine.has_work:
            for output in self._engine.step():
                texts[int(output.request_id)] += output.chunk.text
                if output.chunk.finish_reason is FinishReason.STOP:
                    ended.add(int(output.request_id))
        return sum(i in ended and texts[i] == row.response for i, row in enumerate(rows)) / len(rows)
