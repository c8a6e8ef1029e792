"""Measures a whole system on held-out data: per domain, what the plain base, the router's choice, the right adapter and
the worst adapter give. Uses the engine and the mixed batch that serve, not those of training.
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.config.serving import EngineSettings
from cluster.engine.engine import Engine
from cluster.errors import InvalidData, PromptTooLong
from cluster.lora.catalog import Catalog
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
from cluster.training.data import Row, data_digest, read_data
from cluster.training.mixture_losses import MixtureLosses, mixture_of
from cluster.training.router_evaluation import RouterReport, evaluate_router
from cluster.training.run import Run
from cluster.training.stage_router import chosen_domain

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
    """Through the adapter that does worst of those that were tried, measured on the first rows only."""
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
    """Share whose heaviest domain is the right one, of prompts as they are sent."""
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
    data: str
    """The digest of what it was measured on (`data_digest`)."""
    rows_per_domain: int
    """The most rows of a domain that were measured."""
    domains: dict[str, DomainReport]
    routing: RouterReport
    """Of the router alone, on the same rows' bare prompts and on those of no domain."""


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How much is measured."""

    root: Path
    data: Path
    split: str = "test"
    rows_per_domain: int = 100
    worst_rows: int = 24
    """Rows per domain that go through other adapters to find the worst."""
    worst_of: int = 32
    """Other adapters that are tried; drawn for each domain, always the same ones, where there are more."""
    max_tokens: int = 384


def evaluate(settings: EvaluationSettings, run: Run) -> Report:
    """Measure the system in `settings.root` on one split of the data, on the run's device."""
    data = read_data(settings.data)
    state = Catalog(settings.root).load()
    require_adapters(settings.root, state)
    device = run.workers.device
    judge = _Judge(published_base(settings.root, state, device=device), settings)
    router = published_router(settings.root, state)
    for domain in state.adapters:
        judge.adapters[state.ref(domain)] = published_adapter(settings.root, state.ref(domain), device)
    # A domain whose adapter was combined with another's is an alias of that.
    refs = {name: state.ref(name) for name in (*state.adapters, *state.aliases)}
    domains = [name for name in data.domains if name in refs and data.rows(settings.split, name)]
    if not domains:
        raise InvalidData(f"{settings.data} has no {settings.split} rows of {', '.join(sorted(state.adapters))}.")
    run.start("evaluation", len(domains))
    reports = {}
    for index, domain in enumerate(domains):
        rows = data.rows(settings.split, domain, settings.rows_per_domain)
        prompts = [row.prompt for row in rows]  # as a server would be asked; `routing` is of the bare ones
        stranger = router.without_domain(domain) if domain in router.domains else router
        decisions = router.route(prompts), stranger.route(prompts)
        others = [state.ref(name) for name in sorted(state.adapters) if state.ref(name) != refs[domain]]
        if len(others) > settings.worst_of:
            # A string seeds Random through SHA-512: the same in every process.
            others = random.Random(domain).sample(others, settings.worst_of)
        reports[domain] = judge.domain(rows, *decisions, refs, others, index)
        run.report(index + 1, {})
    routed = [row for name in domains for row in data.rows(settings.split, name, settings.rows_per_domain)]
    routing = evaluate_router(router, [*routed, *data.rows(settings.split, NONE_DOMAIN)], settings.split)
    return Report(
        state.generation, settings.split, data_digest(settings.data), settings.rows_per_domain, reports, routing
    )


class _Judge:
    """Losses and answers of a base under given mixtures."""

    def __init__(self, base: Base, settings: EvaluationSettings) -> None:
        self._settings, self._tokenizer = settings, base.tokenizer
        # The engine takes its model over, so losses have one of their own.
        self._losses = MixtureLosses(base, settings.max_tokens)
        self.adapters = self._losses.adapters
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
        routed, strange = ([mixture_of(d.weights, refs) for d in some] for some in (decisions, strange_decisions))
        oracle = [Mixture.of({refs[domain]: 1.0})] * len(rows)
        plain = [Mixture()] * len(rows)
        heaviest = [chosen_domain(decision) for decision in decisions]
        few = rows[: self._settings.worst_rows]
        losses = {
            ref.domain: self._losses.mean(few, [Mixture.of({ref: 1.0})] * len(few)) for ref in (refs[domain], *others)
        }
        worst = max(losses, key=lambda name: losses[name])
        base, by_router, by_oracle, by_strange = (self._losses.mean(rows, m) for m in (plain, routed, oracle, strange))
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

    def exact_match(self, rows: Sequence[Row], mixtures: Sequence[Mixture]) -> float:
        """Share of rows that the engine answers word for word."""
        for ref in {ref for mixture in mixtures for ref in mixture.refs} - set(self._engine.stats().resident_adapters):
            self._engine.add_adapter(ref, self.adapters[ref])
        asked = as_question(self._tokenizer)
        for number, (row, mixture) in enumerate(zip(rows, mixtures, strict=True)):
            request = GenerateRequest(
                str(number), asked(row.prompt), mixture, SamplingParams(max_tokens=_CHECKABLE_CHARACTERS)
            )
            # What a server would refuse is not answered either.
            with suppress(PromptTooLong):
                self._engine.submit(request)
        texts = dict.fromkeys(range(len(rows)), "")
        ended = set()
        while self._engine.has_work:
            for output in self._engine.step():
                texts[int(output.request_id)] += output.chunk.text
                if output.chunk.finish_reason is FinishReason.STOP:
                    ended.add(int(output.request_id))
        return sum(i in ended and texts[i] == row.response for i, row in enumerate(rows)) / len(rows)
