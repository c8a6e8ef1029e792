"""Which of some given labels answers a prompt: what is asked, and log-probabilities made into shares.

Knows nothing of models: how likely each label is has been found out elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cluster.errors import InvalidInput
from cluster.messages import AnswerScore, ClientRequest

MAX_LABELS = 64
MAX_LABEL_CHARACTERS = 256


class Normalize(Enum):
    """By what labels are compared."""

    SUM = "sum"
    """The log-probability of the whole label. One whose tokens begin another's, "York" beside "York City", is never the
    less likely of the two."""
    LENGTH = "length"
    """The mean per token, so that a label of many tokens is at no disadvantage."""


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """What a client asked for, over HTTP or gRPC, before routing."""

    asked: ClientRequest
    """Prompt, who answers, priority and time limit; nothing is sampled, so its sampling and number of choices are not
    read."""
    labels: tuple[str, ...]
    """1 to `MAX_LABELS`, distinct, each as the model would have to write it."""
    normalize: Normalize = Normalize.SUM

    def __post_init__(self) -> None:
        if not 1 <= len(self.labels) <= MAX_LABELS:
            raise InvalidInput(f"There are {len(self.labels)} labels; expected 1 to {MAX_LABELS}.")
        seen: set[str] = set()
        for label in self.labels:
            if not label:
                raise InvalidInput("A label is empty; give each at least one character.")
            if len(label) > MAX_LABEL_CHARACTERS:
                size = len(label)
                raise InvalidInput(
                    f"The label {label[:20]!r}... has {size} characters; give {MAX_LABEL_CHARACTERS} at most."
                )
            if label in seen:
                raise InvalidInput(f"The label {label!r} is given twice; give each label once.")
            try:
                label.encode()
            except UnicodeEncodeError:
                why = f"The label {label!r} is not valid UTF-8; send text without lone surrogates."
                raise InvalidInput(why) from None
            seen.add(label)


@dataclass(frozen=True, slots=True)
class LabelScore:
    """How likely one label is."""

    label: str
    logprob: float
    """Natural logarithm of the probability that the model gives the label's tokens after the prompt, no end counted."""
    num_tokens: int
    probability: float
    """Its share among the labels: the softmax of what they are compared by."""


def label_scores(
    labels: Sequence[str], scores: Sequence[AnswerScore], normalize: Normalize = Normalize.SUM
) -> tuple[LabelScore, ...]:
    """The labels with their shares, in the order given."""
    compared = [
        score.logprob / score.num_tokens if normalize is Normalize.LENGTH else score.logprob for score in scores
    ]
    # Differences to the largest: far from it the share is 0, and nothing overflows.
    weights = [math.exp(value - max(compared)) for value in compared]
    total = math.fsum(weights)
    return tuple(
        LabelScore(label, score.logprob, score.num_tokens, weight / total)
        for label, score, weight in zip(labels, scores, weights, strict=True)
    )


def likeliest(scores: Sequence[LabelScore]) -> LabelScore:
    """The one with the largest share; of a tie, the first."""
    return max(scores, key=lambda score: score.probability)
