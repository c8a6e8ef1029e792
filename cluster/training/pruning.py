"""Which adapters a library could do without, and what that would cost: measured, not guessed, and nothing is changed.

Two things can be done: drop an adapter, so that its prompts go where the router then sends them; or combine two that do
nearly the same, so that one answers for the domains of both. The cheapest is tried first, and what costs any domain
more than `epsilon` is taken back. Letters: N adapters, M rows.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import InvalidData, InvalidInput
from cluster.lora.catalog import Catalog, CatalogState
from cluster.lora.merging import merge_parts, reduce_share
from cluster.lora.weights import AdapterWeights
from cluster.messages import AdapterRef
from cluster.training.artifacts import published_adapter, published_base, published_router, require_adapters
from cluster.training.data import Row, read_data
from cluster.training.library import Library, is_draft
from cluster.training.mixture_losses import MixtureLosses
from cluster.training.run import Run
from cluster.training.similarity import cosine, functional_products

_LEAST_LOSS = 1e-9
"""Nats per token; a domain may have lost nothing at all."""


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """What is measured, and how far it may go."""

    root: Path
    data: Path
    keep: int = 1
    """Stop at so many adapters."""
    epsilon: float = 0.02
    """The most that the loss of any domain may rise, as a share of what it was."""
    split: str = "val"
    rows_per_domain: int = 32
    least_similarity: float = 0.3
    """Of two adapters that may be combined, the cosine of what they do."""
    max_tokens: int = 384


@dataclass(frozen=True, slots=True)
class Use:
    """What one domain's adapter is worth to the library as it is."""

    mass: float
    """The mean weight that the router gives it, over the rows of all domains."""
    ablation_regret: float
    """Nats per token that the rows which use it lose without it."""
    similar_to: str
    similarity: float
    """Cosine of what it does and what the adapter most like it does."""


@dataclass(frozen=True, slots=True)
class Step:
    """Something that was tried."""

    domain: str
    into: str | None
    """The domain that it was combined with; None where it was dropped."""
    cost: float
    """What it adds to the domains' losses, each as a share of what it was before all steps, on the mean of the domains:
    routing mass times ablation regret, where one-word answers count as much as long ones."""
    worst_domain: str
    worst_change: float
    """The rise of that domain's loss over what it was before all steps, as a share."""
    accepted: bool


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What was found."""

    generation: int
    split: str
    epsilon: float
    num_adapters: int
    uses: dict[str, Use]
    steps: tuple[Step, ...]
    answered_by: dict[str, str | None]
    """By domain: whose adapter answers for it in the end, None where it has none."""
    loss_before: dict[str, float]
    loss_after: dict[str, float]

    @property
    def num_kept(self) -> int:
        """Adapters in the end."""
        return len({domain for domain in self.answered_by.values() if domain is not None})

    def changes(self) -> dict[str, float]:
        """The rise of each domain's loss, as a share of what it was."""
        return {name: _rise(before, self.loss_after[name]) for name, before in self.loss_before.items()}


@dataclass(frozen=True, slots=True)
class Pruning:
    """A proposal: what to publish, and the report that speaks for it."""

    report: PruneReport
    combined: dict[str, AdapterWeights]
    """New adapters, by the domain whose next version each is."""
    dropped: tuple[str, ...]
    aliases: dict[str, str]
    """Domains that another one's adapter answers for."""


@dataclass(frozen=True, slots=True)
class _Action:
    ref: AdapterRef
    into: AdapterRef | None


@dataclass(slots=True)
class _Measured:
    """A library, and what it loses on every row."""

    library: Library
    weights: list[dict[str, float]]
    nats_M: Tensor


def prune(settings: PruneSettings, run: Run) -> Pruning:
    """Measure what can be dropped or combined. Raises `InvalidData` without rows, `StageOrder` without adapters."""
    state = Catalog(settings.root).load()
    require_adapters(settings.root, state)
    data = read_data(settings.data)
    if not 1 <= settings.keep <= len(state.adapters):
        raise InvalidInput(f"{settings.keep} adapters are to be kept of {len(state.adapters)}; name 1 to that many.")
    known = state.adapters.keys() | state.aliases.keys()
    names = [name for name in data.domains if name in known and data.rows(settings.split, name)]
    if not names:
        raise InvalidData(f"{settings.data} has no {settings.split} rows of {', '.join(sorted(state.adapters))}.")
    rows = [row for name in names for row in data.rows(settings.split, name, settings.rows_per_domain)]
    return _Pruner(settings, state, rows, run).propose()


class _Pruner:
    def __init__(self, settings: PruneSettings, state: CatalogState, rows: Sequence[Row], run: Run) -> None:
        """`rows` of one domain stand together."""
        self._settings, self._state, self._rows, self._run = settings, state, rows, run
        names = [row.domain for row in rows]
        self._own = {n: slice(names.index(n), names.index(n) + names.count(n)) for n in dict.fromkeys(names)}
        base = published_base(settings.root, state)
        self._losses = MixtureLosses(base, settings.max_tokens)
        router = published_router(settings.root, state)
        refs = {name: state.ref(name) for name in (*state.adapters, *(state.aliases.keys() & set(router.domains)))}
        self._numbers = {name: number for number, name in enumerate(state.adapters)}
        self._losses.adapters.update(
            {state.ref(n): published_adapter(settings.root, state.ref(n)) for n in self._numbers}
        )
        sample = [row for _, own in itertools.groupby(rows, lambda row: row.domain) for row in itertools.islice(own, 8)]
        adapters = [self._losses.adapters[state.ref(name)] for name in self._numbers]
        self._products_NN = functional_products(base, adapters, sample, settings.max_tokens)
        library = Library.of(router, refs)
        self._first_names = sorted(refs)
        # Not those with rows of their own beside the adapter, which a new version would have to take along.
        self._combinable = {name for name in library.router.domains if name in refs and name not in state.prototypes}
        weights = [dict(d.weights) for d in library.router.route([row.prompt for row in rows])]
        nats_M, self._tokens_M = self._losses.of_rows(rows, library.mixtures(weights))
        self._now = _Measured(library, weights, nats_M)
        self._before = self._by_domain(nats_M)
        # So that nats times these are each domain's loss as a share of what it was, divided by the number of domains.
        self._shares_M = torch.empty_like(nats_M)
        for name, own in self._own.items():
            tokens = int(self._tokens_M[own].sum())
            self._shares_M[own] = 1 / (max(self._before[name], _LEAST_LOSS) * tokens * len(self._own))
        self._masses = self._mass(weights)

    def propose(self) -> Pruning:
        drops = [_Action(ref, None) for ref in self._now.library.parts]
        self._run.start("pruning", 2 * len(drops))
        queue: list[tuple[float, int, _Action]] = []
        order = itertools.count()
        uses = {}
        for number, action in enumerate(drops, start=1):
            tried = self._try(action)
            heapq.heappush(queue, (self._cost(tried), next(order), action))
            uses[action.ref.domain] = self._use(action.ref, tried)
            self._run.report(number, {})
        for ref in self._now.library.parts:
            self._offer(ref, queue, order)
        steps: list[Step] = []
        while queue and self._now.library.size > self._settings.keep:
            stale, _, action = heapq.heappop(queue)
            if not self._is_current(action):
                continue
            tried = self._try(action)
            cost = self._cost(tried)
            if queue and cost > max(stale, queue[0][0]):
                # Others' steps have made it dearer; something else may be cheaper now.
                heapq.heappush(queue, (cost, next(order), action))
                continue
            steps.append(self._judged(action, tried, cost))
            if steps[-1].accepted:
                self._accept(tried, action, queue, order)
            self._run.report(len(drops) + min(len(steps), len(drops)), {"adapters": float(self._now.library.size)})
        return self._proposal(uses, tuple(steps))

    def _offer(self, ref: AdapterRef, queue: list[tuple[float, int, _Action]], order: "itertools.count[int]") -> None:
        """Put combining `ref` with the one most like it into the queue, where that may be done."""
        if (nearest := self._nearest(ref)) is None or nearest[1] < self._settings.least_similarity:
            return
        into = nearest[0]
        if {*self._now.library.names(ref), *self._now.library.names(into)} <= self._combinable:
            action = _Action(ref, into)
            heapq.heappush(queue, (self._cost(self._try(action)), next(order), action))

    def _accept(
        self, tried: _Measured, action: _Action, queue: list[tuple[float, int, _Action]], order: "itertools.count[int]"
    ) -> None:
        new = [ref for ref in tried.library.parts if ref not in self._now.library.parts]
        orphaned = {
            other.ref for _, _, other in queue if other.into is not None and other.into not in tried.library.parts
        }
        self._now = tried
        for ref in new:
            heapq.heappush(queue, (self._cost(self._try(_Action(ref, None))), next(order), _Action(ref, None)))
        for ref in (*new, *orphaned):
            if ref in tried.library.parts:
                self._offer(ref, queue, order)

    def _is_current(self, action: _Action) -> bool:
        parts = self._now.library.parts
        return action.ref in parts and (action.into is None or action.into in parts)

    def _try(self, action: _Action) -> _Measured:
        """The library after `action`; only rows whose mixture that changes are measured anew."""
        now = self._now
        gone = {*now.library.names(action.ref), *(now.library.names(action.into) if action.into is not None else ())}
        touched = [number for number, of_row in enumerate(now.weights) if gone & of_row.keys()]
        rows = [self._rows[number] for number in touched]
        weights, nats_M = list(now.weights), now.nats_M.clone()
        if action.into is None:
            after = now.library.without(action.ref)
            # A row that did not use it is decided as before: removing a domain leaves other logits as they are.
            for number, decision in zip(touched, after.router.route([r.prompt for r in rows]), strict=True):
                weights[number] = dict(decision.weights)
        else:
            after = self._combined(now.library, action.ref, action.into)
        if touched:
            nats_M[touched], _ = self._losses.of_rows(rows, after.mixtures([weights[number] for number in touched]))
        return _Measured(after, weights, nats_M)

    def _combined(self, library: Library, ref: AdapterRef, into: AdapterRef) -> Library:
        """One adapter for both, weighted by their mass: of the larger rank, and nearest to the sum at that."""
        # What earlier tries made is of no more use.
        for stale in [one for one in self._losses.adapters if is_draft(one) and one not in library.parts]:
            del self._losses.adapters[stale]
        masses = [max(sum(self._masses.get(name, 0.0) for name in library.names(one)), 1e-6) for one in (ref, into)]
        shares = masses[0] / sum(masses), masses[1] / sum(masses)
        after = library.combined(ref, into, shares)
        (draft,) = (one for one in after.parts if one not in library.parts)
        both = [self._losses.adapters[ref], self._losses.adapters[into]]
        rank = max(factors.rank for adapter in both for factors in adapter.factors.values())
        merged = merge_parts([reduce_share(both, list(shares))], rank, torch.float32)
        self._losses.adapters[draft] = merged.weights
        return after

    def _cost(self, tried: _Measured) -> float:
        return float((tried.nats_M - self._now.nats_M) @ self._shares_M)

    def _judged(self, action: _Action, tried: _Measured, cost: float) -> Step:
        after = self._by_domain(tried.nats_M)
        changes = {name: _rise(before, after[name]) for name, before in self._before.items()}
        worst = max(changes, key=changes.__getitem__)
        into = None if action.into is None else action.into.domain
        accepted = changes[worst] <= self._settings.epsilon
        return Step(action.ref.domain, into, cost, worst, changes[worst], accepted)

    def _use(self, ref: AdapterRef, dropped: _Measured) -> Use:
        names = set(self._now.library.names(ref))
        using = torch.tensor([bool(names & of_row.keys()) for of_row in self._now.weights])
        lost, tokens = (dropped.nats_M - self._now.nats_M)[using].sum(), self._tokens_M[using].sum()
        nearest = self._nearest(ref)
        return Use(
            self._masses.get(ref.domain, 0.0),
            float(lost) / max(1, int(tokens)),
            nearest[0].domain if nearest else "",
            nearest[1] if nearest else 0.0,
        )

    def _nearest(self, ref: AdapterRef) -> tuple[AdapterRef, float] | None:
        """The adapter that does what is most like what `ref` does, with the cosine; None where it is alone."""
        parts = self._now.library.parts
        own_N = self._shares(parts[ref])
        near = {o: cosine(self._products_NN, own_N, self._shares(parts[o])) for o in parts if o != ref}
        return max(near.items(), key=lambda item: item[1], default=None)

    def _shares(self, parts: Mapping[str, float]) -> Tensor:
        shares_N = torch.zeros(len(self._numbers), dtype=torch.float64)
        for name, share in parts.items():
            shares_N[self._numbers[name]] = share
        return shares_N

    def _mass(self, weights: Sequence[dict[str, float]]) -> dict[str, float]:
        masses: dict[str, float] = {}
        for of_row in weights:
            for name, weight in of_row.items():
                masses[name] = masses.get(name, 0.0) + weight / len(weights)
        return masses

    def _by_domain(self, nats_M: Tensor) -> dict[str, float]:
        """Nats per token of each domain's rows."""
        return {n: float(nats_M[own].sum()) / int(self._tokens_M[own].sum()) for n, own in self._own.items()}

    def _proposal(self, uses: dict[str, Use], steps: tuple[Step, ...]) -> Pruning:
        answers = self._now.library.answers
        answered_by = {name: answers[name].domain if name in answers else None for name in self._first_names}
        report = PruneReport(
            self._state.generation,
            self._settings.split,
            self._settings.epsilon,
            len(self._state.adapters),
            uses,
            steps,
            answered_by,
            self._before,
            self._by_domain(self._now.nats_M),
        )
        combined = {ref.domain: self._losses.adapters[ref] for ref in self._now.library.parts if is_draft(ref)}
        # An alias goes with the domain that it names.
        dropped = tuple(name for name, by in answered_by.items() if by is None and name in self._state.adapters)
        aliases = {name: by for name, by in answered_by.items() if by is not None and by != name}
        return Pruning(report, combined, dropped, aliases)


def _rise(before: float, after: float) -> float:
    """As a share of what it was."""
    return (after - before) / max(before, _LEAST_LOSS)
