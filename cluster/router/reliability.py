"""What a router's confidence is worth. Plain numbers: who watches a running system imports no torch for it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers whose probabilities lie close to one another."""

    rows: int
    confidence: float
    """The mean of their probabilities; 0 where there are none."""
    right: float
    """The share of them that is right."""


def reliability_bins(confident_and_right: Iterable[tuple[float, bool]], num_bins: int) -> list[Bin]:
    """`num_bins` of equal width from 0 to 1. Each pair is a probability that was given and whether it was given to
    the right answer.
    """
    rows, confidence, right = [0] * num_bins, [0.0] * num_bins, [0] * num_bins
    for given, is_right in confident_and_right:
        index = min(num_bins - 1, int(given * num_bins))
        rows[index] += 1
        confidence[index] += given
        right[index] += is_right
    return [Bin(n, c / max(n, 1), r / max(n, 1)) for n, c, r in zip(rows, confidence, right, strict=True)]


def expected_error(bins: Iterable[Bin]) -> float:
    """Expected calibration error (Naeini et al. 2015): how far confidence is from accuracy, each bin counting as much
    as it has rows; one must have some.
    """
    kept = list(bins)
    return sum(one.rows * abs(one.confidence - one.right) for one in kept) / sum(one.rows for one in kept)


def calibration_error(confident_and_right: Iterable[tuple[float, bool]], num_bins: int) -> float:
    """The expected error of these pairs over `num_bins`; there must be one pair at least."""
    return expected_error(reliability_bins(confident_and_right, num_bins))


def effective_number(mass: Iterable[float]) -> float:
    """exp of the entropy of shares, which need not sum to 1: as many equal ones would be as diverse (Hill 1973)."""
    kept = [share for share in mass if share > 0]
    total = sum(kept)
    return math.exp(-sum(share / total * math.log(share / total) for share in kept)) if kept else 0.0
