"""Logits -> what to mix. Knows nothing of text, vectors or prototypes.

A domain is selected when its logit exceeds none's by the threshold, which no other domain has a say in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.messages import MAX_PROBABILITIES, NONE_DOMAIN, WEIGHT_STEP

MAX_SELECTED = 3
"""The most domains the router mixes."""

MIN_SHARE = 1 / 8
"""A domain with less than this share beside the best one is left out: it would blur the answer of the best."""


_FEW = 64
"""Up to so many domains plain Python is quicker than numpy, most of all when neither is in a cache."""

Key = TypeVar("Key", int, str)
"""A domain's number or its name."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What was decided on validation data."""

    threshold: float
    """How far a domain's logit must exceed none's to be selected; may be negative."""

    def weights(self, domains: Sequence[str], logits: NDArray[np.float64]) -> dict[str, float]:
        """The domains to mix, at most `MAX_SELECTED`, with weights that sum to 1; empty for none.

        `logits` holds one number per domain, in the order of their names, and none's last. Equal logits are taken in
        that order.
        """
        return {domains[number]: weight for number, weight in self.numbered_weights(logits).items()}

    def numbered_weights(self, logits: NDArray[np.float64]) -> dict[int, float]:
        """`weights` by the numbers of the domains."""
        best = self._best_of_few(logits.tolist()) if len(logits) <= _FEW else self._best_of_many(logits)
        if not best:
            return {}
        most = max(best.values())
        shares = {number: math.exp(margin - most) for number, margin in best.items()}
        total = sum(shares.values())
        return round_weights({number: share / total for number, share in shares.items() if share / total >= MIN_SHARE})

    def _best_of_few(self, logits: list[float]) -> dict[int, float]:
        """The margins over none of those that are selected, by number, the largest first."""
        *values, none = logits
        passing = [(number, value - none) for number, value in enumerate(values) if value - none >= self.threshold]
        return dict(sorted(passing, key=lambda item: -item[1])[:MAX_SELECTED])

    def _best_of_many(self, logits: NDArray[np.float64]) -> dict[int, float]:
        margins = logits[:-1] - logits[-1]
        passing = np.flatnonzero(margins >= self.threshold)
        best = passing[_largest(margins[passing], MAX_SELECTED)]
        return dict(zip(best.tolist(), margins[best].tolist(), strict=True))


def round_weights(weights: Mapping[Key, float]) -> dict[Key, float]:
    """`weights`, positive, as multiples of `WEIGHT_STEP` that sum to 1: by largest remainder, ties by name."""
    total = sum(weights.values())
    steps = round(1 / WEIGHT_STEP)
    exact = {name: weight / total * steps for name, weight in weights.items()}
    whole = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (whole[name] - exact[name], name))
    for name in by_remainder[: steps - sum(whole.values())]:
        whole[name] += 1
    return {name: count * WEIGHT_STEP for name, count in whole.items() if count}


def probabilities(domains: Sequence[str], logits: NDArray[np.float64]) -> dict[str, float]:
    """The softmax of `logits` over the domains and none: the `MAX_PROBABILITIES` likeliest domains, and none last."""
    if len(logits) <= MAX_PROBABILITIES:
        values = logits.tolist()
        most = max(values)
        powers = [math.exp(value - most) for value in values]
        total = sum(powers)
        return {name: power / total for name, power in zip((*domains, NONE_DOMAIN), powers, strict=True)}
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    named = sorted(_largest(logits[:-1], MAX_PROBABILITIES).tolist())
    return {**{domains[number]: float(shares[number]) for number in named}, NONE_DOMAIN: float(shares[-1])}


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The numbers of the `count` largest values, the largest first, equal ones in their order."""
    candidates = np.arange(len(values))
    if len(values) > count:
        # A quarter of what numpy's partition takes.
        least = float(torch.from_numpy(values).topk(count).values[-1])
        candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]
