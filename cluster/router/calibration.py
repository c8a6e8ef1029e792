"""Logits of held-out prompts -> temperature and threshold. Knows nothing of text or vectors.

Letters: N prompts, C = domains + 1, none last.
"""

import math

from torch import Tensor, nn

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.5, 20.0
"""Where no held-out prompt is wrong the likelihood asks for a temperature of 0, which would promise certainty."""

_ROUNDS = 40


def fit_temperature(logits_NC: Tensor, labels_N: Tensor) -> float:
    """The temperature under which the labels are likeliest, by golden-section search on its logarithm."""

    def loss(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits_NC.double() / math.exp(log_temperature), labels_N))

    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(_ROUNDS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        # A plateau lies where the labels are certain already: the lower end of it is the temperature.
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def fit_threshold(logits_NC: Tensor, labels_N: Tensor, target_false_rejection: float) -> float:
    """The threshold on a domain's logit minus none's, from the prompts that belong to a domain.

    Split conformal: of n exchangeable prompts, turning away those whose best domain lies below the k-th smallest
    margin, k = floor(target * (n + 1)), turns away a new one with at most the target probability. The threshold is
    that quantile, but never above 0, where none is as likely as the domain: new prompts are seldom quite exchangeable
    with the held-out ones, and a domain that is likelier than none should not be turned away.
    Too few prompts for a quantile give 0.
    """
    known_N = labels_N < logits_NC.shape[1] - 1
    margins_N = (logits_NC[known_N, :-1].amax(1) - logits_NC[known_N, -1]).sort().values
    k = math.floor(target_false_rejection * (len(margins_N) + 1))
    if k == 0:
        return 0.0
    return min(0.0, float(margins_N[k - 1]))
