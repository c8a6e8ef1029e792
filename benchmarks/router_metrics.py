"""Figures of merit of a router, from its probabilities and scores. Knows nothing of text or of any router.

Letters: B texts, D domains.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def auroc(inside: Floats, outside: Floats) -> float:
    """The chance that a text inside scores above one outside, an equal score counting half: 1 is perfect, 0.5 blind.

    Both are scores, one per text, higher the surer it belongs to a domain. Neither may be empty.
    """
    assert len(inside), "a comparison needs texts inside"
    assert len(outside), "a comparison needs texts outside"
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, side="left")
    up_to = np.searchsorted(ordered, inside, side="right")
    return float((below + up_to).sum() / 2 / (len(inside) * len(outside)))


def false_positive_rate(inside: Floats, outside: Floats, true_positive_rate: float = 0.95) -> float:
    """The share of texts outside that are let in by the highest threshold that lets in so many of those inside.

    A text is let in when its score reaches the threshold. Neither may be empty.
    """
    assert len(inside), "a comparison needs texts inside"
    assert len(outside), "a comparison needs texts outside"
    # Less a hair, since 0.95 times 20 is not quite 19.
    num_let_in = max(1, int(np.ceil(true_positive_rate * len(inside) - 1e-9)))
    threshold = np.sort(inside)[len(inside) - num_let_in]
    return float((outside >= threshold).mean())


def calibration_error(confidence_B: Floats, correct_B: Flags, num_bins: int = 15) -> float:
    """The expected calibration error: how far off confidence is from accuracy, over bins of equal width in (0, 1].

    Confidences are probabilities; a bin counts by the share of texts in it.
    """
    assert len(confidence_B) == len(correct_B) > 0, "each text has a confidence and was right or wrong"
    bins_B = np.clip(np.ceil(confidence_B * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins_B, weights=confidence_B - correct_B, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence_B))


def log_softmax(logits_BD: Floats) -> Floats:
    """[B, D]: logarithms of probabilities."""
    shifted_BD = logits_BD - logits_BD.max(axis=1, keepdims=True)
    result: Floats = shifted_BD - np.log(np.exp(shifted_BD).sum(axis=1, keepdims=True))
    return result


def log_sum_exp(logits_BD: Floats) -> Floats:
    """[B]."""
    top_B = logits_BD.max(axis=1)
    result: Floats = top_B + np.log(np.exp(logits_BD - top_B[:, None]).sum(axis=1))
    return result
