"""Measures a router alone on held-out prompts: right domains, abstentions, calibration, confusions, milliseconds.

Needs no base and no adapter.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from cluster.errors import InvalidData
from cluster.messages import NONE_DOMAIN, RoutingDecision
from cluster.router import reliability
from cluster.router.reliability import Bin
from cluster.router.tiny_ada import TinyAda
from cluster.training.data import Row
from cluster.training.stage_router import chosen_domain

NUM_BINS = 15
MAX_TIMED_PROMPTS = 500
MAX_CONFUSIONS = 10


@dataclass(frozen=True, slots=True)
class DomainRouting:
    """One domain's prompts."""

    rows: int
    right: float
    """Share whose heaviest domain is the right one."""
    turned_away: float
    """Share sent to the plain base."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Prompts of one domain that went to another, or of none that went to some."""

    domain: str
    routed_to: str
    rows: int
    example: str


@dataclass(frozen=True, slots=True)
class RouterReport:
    """The measurements of one router on one split."""

    split: str
    parameters: int
    domains: dict[str, DomainRouting]
    accuracy: float
    """Over all prompts that belong to a domain."""
    turned_away: float
    none_rows: int
    none_to_base: float | None
    """Share of the prompts of no domain that were sent to the plain base."""
    calibration_error: float
    """Expected, over `NUM_BINS` bins of the largest probability, prompts of none included."""
    confusions: tuple[Confusion, ...]
    """The most frequent first; domains' prompts that went to none are not among them."""
    counts: dict[str, dict[str, int]]
    """Rows of each domain, and of none, by the domain that they went to; where there were none, nothing."""
    bins: tuple[Bin, ...]
    """Of the largest probability, whose distance to what was right is the calibration error."""
    effective_domains: float
    """As many domains, used equally, would be as diverse as the weights that the domains' prompts were given."""
    p50_ms: float
    """Median time of one prompt, asked alone, on one thread."""


def evaluate_router(router: TinyAda, rows: Sequence[Row], split: str) -> RouterReport:
    """Route every row's prompt and compare. Raises `InvalidData` when no row is of a domain that the router knows."""
    by_domain = {name: [row for row in rows if row.domain == name] for name in (*router.domains, NONE_DOMAIN)}
    rows = [row for part in by_domain.values() for row in part]
    if len(rows) == len(by_domain[NONE_DOMAIN]):
        raise InvalidData(
            f"The data have no {split} rows of {', '.join(router.domains)}; name another --split or --data."
        )
    decisions = router.route([row.bare_prompt for row in rows])
    chosen = [chosen_domain(decision) for decision in decisions]
    counts: dict[str, Counter[str]] = {}
    for row, name in zip(rows, chosen, strict=True):
        counts.setdefault(row.domain, Counter())[name] += 1
    domains = {
        name: DomainRouting(found.total(), found[name] / found.total(), found[NONE_DOMAIN] / found.total())
        for name, found in counts.items()
    }
    none = domains.pop(NONE_DOMAIN, None)
    num_known = sum(domain.rows for domain in domains.values())
    mass: Counter[str] = Counter()
    for decision in decisions[:num_known]:
        mass.update(decision.weights)
    bins = _bins(decisions, [row.domain for row in rows])
    return RouterReport(
        split,
        router.num_parameters,
        domains,
        sum(domain.right * domain.rows for domain in domains.values()) / num_known,
        sum(domain.turned_away * domain.rows for domain in domains.values()) / num_known,
        none.rows if none else 0,
        none.right if none else None,
        reliability.expected_error(bins),
        _confusions(rows, chosen),
        {name: dict(found) for name, found in counts.items()},
        bins,
        reliability.effective_number(mass.values()),
        _median_ms(router, [row.bare_prompt for row in rows]),
    )


def calibration_error(decisions: Sequence[RoutingDecision], domains: Sequence[str]) -> float:
    """How far, on average, the largest probability is from the share of prompts for which it is right.

    Prompts are binned by it, `NUM_BINS` of equal width; each bin counts as much as it has prompts.
    """
    return reliability.expected_error(_bins(decisions, domains))


def _bins(decisions: Sequence[RoutingDecision], domains: Sequence[str]) -> tuple[Bin, ...]:
    likeliest = [max(d.probabilities, key=d.probabilities.__getitem__) for d in decisions]
    asked = zip(decisions, likeliest, domains, strict=True)
    pairs = ((d.probabilities[name], name == domain) for d, name, domain in asked)
    return tuple(reliability.reliability_bins(pairs, NUM_BINS))


def _confusions(rows: Sequence[Row], chosen: Sequence[str]) -> tuple[Confusion, ...]:
    examples: dict[tuple[str, str], str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row, name in zip(rows, chosen, strict=True):
        if name not in (row.domain, NONE_DOMAIN):
            counts[row.domain, name] += 1
            examples.setdefault((row.domain, name), row.bare_prompt)
    return tuple(Confusion(*pair, count, examples[pair]) for pair, count in counts.most_common(MAX_CONFUSIONS))


def _median_ms(router: TinyAda, prompts: Sequence[str]) -> float:
    """Over prompts taken evenly from all; the first ones warm up and do not count."""
    timed = prompts[:: -(-len(prompts) // MAX_TIMED_PROMPTS)]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the Router's deployment does
    try:
        for prompt in timed[:20]:
            router.route([prompt])
        times_ms = []
        for prompt in timed:
            start_s = time.perf_counter()
            router.route([prompt])
            times_ms.append((time.perf_counter() - start_s) * 1000)
    finally:
        torch.set_num_threads(num_threads)
    return median(times_ms)
