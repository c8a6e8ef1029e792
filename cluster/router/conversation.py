"""A chat's turns -> the logits that decide for the newest one: its own, and what the turns before it carry over.

A short follow-up ("and of Spain?") belongs to no domain by itself; it belongs to the chat's. Knows nothing of text,
vectors or prototypes. What is carried to a domain depends on that domain's own logits and on what was selected, so a
domain that is never selected has no say.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.router.policy import Policy

MAX_CARRY = 3.0
"""The most that earlier turns add to a domain's logit, in nats: a newest turn that speaks clearly outweighs it."""

DECAY = 0.5
"""What is left of that after each turn that went to none: what follows it may well belong to it."""

ENOUGH_CHARACTERS = 32
"""A turn of this length speaks for itself; of one of half the length a quarter of what it says against the chat's
domain counts."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One of the user's turns."""

    logits: NDArray[np.float64]
    """What it scores alone: one number per domain, in the order of their names, none's last."""
    num_characters: int


def settle(turns: Sequence[Turn], policy: Policy) -> NDArray[np.float64]:
    """The logits of the last of `turns`, oldest first and at least one, after what those before it carry over.

    Those of a turn that nothing is carried to are its own, bit for bit.
    """
    *before, newest = turns
    carried: dict[int, float] = {}
    for turn in before:
        carried = _carry_on(turn, carried, policy, policy.numbered_weights(_with_carried(turn, carried)))
    return _with_carried(newest, carried)


def _with_carried(turn: Turn, carried: Mapping[int, float]) -> NDArray[np.float64]:
    # Squared: that tells follow-ups from short prompts of no domain better than the plain share (docs/experiments.md).
    say = min(1.0, turn.num_characters / ENOUGH_CHARACTERS) ** 2
    none = turn.logits[-1]
    logits = turn.logits.copy()
    for domain, carry in carried.items():
        margin = logits[domain] - none
        logits[domain] = none + carry + (margin if margin > 0 else say * margin)
    return logits


def _carry_on(turn: Turn, carried: Mapping[int, float], policy: Policy, chosen: Iterable[int]) -> dict[int, float]:
    """What the turn hands on: for the domains it went to, or, if it went to none, for those of before."""
    excess = {domain: float(turn.logits[domain] - turn.logits[-1] - policy.threshold) for domain in chosen}
    if not excess:
        return {domain: DECAY * carry for domain, carry in carried.items()}
    # A follow-up takes nothing from the domain it went to: a chat may have many of them in a row.
    return {domain: max(min(MAX_CARRY, beyond), carried.get(domain, 0.0)) for domain, beyond in excess.items()}
