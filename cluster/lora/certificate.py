"""What is known for certain of a merged delta. Plain numbers, without torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far a merged delta can be from the exact weighted sum."""

    method: str
    """How it was merged: a `Method`'s value, or several joined by "+"."""
    rank: int
    """Of what is served, the most of any layer."""
    bound: float
    """At least the Frobenius distance between the exact sum and what is served, after rounding and the last cast."""
    norm: float
    """Frobenius norm of what is served."""

    @property
    def kept_energy(self) -> float:
        """The share of the sum's squared norm that is kept. What is left out is orthogonal to what is kept, so it is at
        least this, but for the rounding of the last cast, which is not orthogonal: `bound` alone is certain.
        """
        kept, lost = self.norm, self.bound
        return 1 / (1 + (lost / kept) ** 2) if kept > 0 else float(lost == 0)


def in_total(certificates: Iterable[Certificate]) -> Certificate:
    """Of all layers together, at least one: squares of distances between layers' deltas add up."""
    layers = tuple(certificates)
    return Certificate(
        method="+".join(sorted({c.method for c in layers})),
        rank=max(c.rank for c in layers),
        bound=math.hypot(*(c.bound for c in layers)) * (1 + 1e-12),
        norm=math.hypot(*(c.norm for c in layers)),
    )
