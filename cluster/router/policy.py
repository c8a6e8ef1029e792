"""Logits -> what to mix. Knows nothing of text, vectors or prototypes.

A domain is selected when its logit exceeds none's by the threshold, which no other domain has a say in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.messages import NONE_DOMAIN, WEIGHT_STEP

MAX_SELECTED = 3
"""The most domains the router mixes."""

MIN_SHARE = 1 / 8
"""A domain with less than this share beside the best one is left out: it would blur the answer of the best."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What was decided on validation data."""

    threshold: float
    """How far a domain's logit must exceed none's to be selected; may be negative."""

    def weights(self, domains: Sequence[str], logits: Sequence[float]) -> dict[str, float]:
        """The domains to mix, at most `MAX_SELECTED`, with weights that sum to 1; empty for none.

        `logits` holds one number per domain and none's last. Equal logits are taken in the order of the names.
        """
        margins = {domain: logit - logits[-1] for domain, logit in zip(domains, logits[:-1], strict=True)}
        passing = [domain for domain in margins if margins[domain] >= self.threshold]
        best = sorted(passing, key=lambda domain: (-margins[domain], domain))[:MAX_SELECTED]
        if not best:
            return {}
        shares = {domain: math.exp(margins[domain] - margins[best[0]]) for domain in best}
        total = sum(shares.values())
        return round_weights({domain: share / total for domain, share in shares.items() if share / total >= MIN_SHARE})


def round_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """`weights`, positive, as multiples of `WEIGHT_STEP` that sum to 1: by largest remainder, ties by name."""
    total = sum(weights.values())
    steps = round(1 / WEIGHT_STEP)
    exact = {name: weight / total * steps for name, weight in weights.items()}
    whole = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (whole[name] - exact[name], name))
    for name in by_remainder[: steps - sum(whole.values())]:
        whole[name] += 1
    return {name: count * WEIGHT_STEP for name, count in whole.items() if count}


def probabilities(domains: Sequence[str], logits: Sequence[float]) -> dict[str, float]:
    """The softmax of `logits` over the domains and none."""
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = sum(powers)
    return {name: power / total for name, power in zip((*domains, NONE_DOMAIN), powers, strict=True)}
