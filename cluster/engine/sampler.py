"""Logits to tokens, each row by its own parameters. Knows nothing of models or text.

Temperature, then top-k, then top-p, as in transformers' generate. The random number of a draw depends on the seed and
the token's position alone, so a sequence draws the same alone, in any batch, and continued elsewhere.
Letters: B sequences, V vocabulary.
"""

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw the token of one row."""

    sampling: SamplingParams
    seed: int
    position: int
    """Of the token to draw, counted from the first of the prompt."""


def sample(logits_BV: Tensor, draws: Rows[Draw]) -> list[int | None]:
    """One token per row; None for a row that holds NaN or infinity, from which nothing can be drawn."""
    finite = torch.isfinite(logits_BV).all(dim=-1).tolist()
    likeliest = logits_BV.argmax(dim=-1).tolist()
    tokens: list[int | None] = []
    for row, draw in enumerate(draws):
        if not finite[row]:
            tokens.append(None)
        elif draw.sampling.temperature == 0:
            tokens.append(likeliest[row])
        else:
            tokens.append(_draw(probabilities(logits_BV[row], draw.sampling), uniform(draw.seed, draw.position)))
    return tokens


def probabilities(logits_V: Tensor, sampling: SamplingParams) -> Tensor:
    """The distribution that a token is drawn from, float64 [V]; `temperature` is above 0.

    As transformers' warpers: a tie with the k-th likeliest is kept, and the likeliest token always is.
    """
    # Differences to the largest, so that the smallest temperature gives 0 and -infinity, never NaN.
    scores_V = (logits_V.double() - logits_V.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores_V):
        kth = scores_V.topk(sampling.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < kth, -torch.inf)
    if sampling.top_p < 1:
        ascending_V, order_V = scores_V.sort()
        outside_V = ascending_V.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        outside_V[-1] = False
        scores_V = scores_V.masked_fill(outside_V.scatter(0, order_V, outside_V), -torch.inf)
    return scores_V.softmax(dim=-1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of seed and position only."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def _draw(probabilities_V: Tensor, number: float) -> int:
    """The token whose share of [0, 1) holds `number`."""
    upto_V = probabilities_V.cumsum(dim=-1)
    # The sum is not exactly 1; scaling by it, and strictly greater, leaves no token of probability 0 to be hit.
    return int((upto_V > number * upto_V[-1]).byte().argmax())
