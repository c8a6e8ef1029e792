"""What a router's confidence is worth. Plain numbers: who watches a running system imports no torch for it."""

from collections.abc import Iterable


def calibration_error(confident_and_right: Iterable[tuple[float, bool]], num_bins: int) -> float:
    """Expected calibration error (Naeini et al. 2015): how far confidence is from accuracy, over bins of equal width.

    Each pair is a probability that was given and whether it was given to the right answer; there must be one at least.
    A bin counts as much as it has pairs.
    """
    surplus, number = [0.0] * num_bins, 0
    for confidence, is_right in confident_and_right:
        surplus[min(num_bins - 1, int(confidence * num_bins))] += confidence - is_right
        number += 1
    return sum(map(abs, surplus)) / number
