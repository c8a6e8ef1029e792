"""Logits to tokens, each row by its own parameters. Knows nothing of models or text.

Logit bias and penalties, temperature, top-k, top-p, min-p, in this order, as in transformers' generate and in vLLM. The
random number of a draw depends on the seed and the token's position alone, so a sequence draws the same alone, in any
batch, and continued elsewhere.
Letters: B sequences, R rows that want log-probabilities, V vocabulary, N tokens whose logits are adjusted, C that
can be drawn, E of these at the edge of top-p.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.messages import SamplingParams

_ARGMAX_BLOCK = 256
_BITS_BELOW_BUCKET = 48
"""Of a float64's 52 bits of fraction: shares in one bucket differ by a sixteenth at most."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw the token of one row."""

    sampling: SamplingParams
    seed: int
    position: int
    """Of the token to draw, counted from the first of the prompt."""
    prompt_ids: Rows[int] = ()
    """Penalties read these two."""
    generated_ids: Rows[int] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of one row."""

    token_id: int
    logprob: float | None = None
    """Its log-probability, where asked for: of the model's own distribution, before bias, penalties and temperature."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens of that distribution with their log-probabilities, as many as asked for, likeliest first."""


def sample(logits_BV: Tensor, draws: Rows[Draw]) -> list[Sampled | None]:
    """One token per row, float32 or narrower; None for a row that holds NaN or infinity: none can be drawn."""
    finite = _is_finite(logits_BV)
    likeliest = _likeliest(logits_BV).tolist()
    sampled: list[Sampled | None] = []
    for row, draw in enumerate(draws):
        if not finite[row]:
            sampled.append(None)
        elif draw.sampling.temperature == 0 and not _adjusts(draw.sampling):
            sampled.append(Sampled(likeliest[row]))
        else:
            sampled.append(Sampled(_token(logits_BV[row], draw)))
    _add_logprobs(sampled, logits_BV, draws)
    return sampled


def score(logits_RV: Tensor, token_ids: Rows[int]) -> list[Sampled | None]:
    """The given tokens, one per row, with their log-probabilities; None for a row that holds NaN or infinity."""
    finite = _is_finite(logits_RV)
    chosen_R = _chosen(logits_RV.float(), token_ids, _log_totals(logits_RV.float())).tolist()
    scored = zip(token_ids, chosen_R, finite, strict=True)
    return [Sampled(token_id, logprob) if ok else None for token_id, logprob, ok in scored]


def adjusted(logits_V: Tensor, draw: Draw) -> Tensor:
    """The row after logit bias and penalties, float64 [V], which no allowed parameter can take to infinity."""
    sampling = draw.sampling
    scores_V = logits_V.to(torch.float64, copy=True)

    def ids(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=scores_V.device)

    if sampling.logit_bias:
        token_ids, biases = zip(*sampling.logit_bias, strict=True)
        scores_V[ids(token_ids)] += scores_V.new_tensor(biases)
    if sampling.repetition_penalty != 1:
        ids_N = ids({*draw.prompt_ids, *draw.generated_ids})
        scores_N = scores_V[ids_N]
        penalty = sampling.repetition_penalty
        scores_V[ids_N] = torch.where(scores_N < 0, scores_N * penalty, scores_N / penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and draw.generated_ids:
        counts = Counter(draw.generated_ids)
        penalties = [sampling.presence_penalty + sampling.frequency_penalty * count for count in counts.values()]
        scores_V[ids(counts)] -= scores_V.new_tensor(penalties)
    return scores_V


def candidates(scores_V: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that can be drawn [C], by id, and their probabilities, float64 [C]; `temperature` is above 0.

    As transformers' warpers: a tie with the k-th likeliest is kept, and the likeliest token always is. Some
    probabilities may be 0.
    """
    if 0 < sampling.top_k < len(scores_V):
        ids_C = (scores_V >= scores_V.topk(sampling.top_k).values[-1]).nonzero()[:, 0]
        scores_C = scores_V[ids_C]
    else:
        ids_C, scores_C = torch.arange(len(scores_V), device=scores_V.device), scores_V
    # Differences to the largest, so that the smallest temperature gives 0 and -infinity, never NaN; it weighs 1.
    weights_C = (scores_C.double() - scores_C.amax()).div_(sampling.temperature).exp_()
    if sampling.top_p < 1:
        weights_C.masked_fill_(_outside_nucleus(weights_C / weights_C.sum(), sampling.top_p), 0)
    if sampling.min_p > 0:
        weights_C.masked_fill_(weights_C < sampling.min_p, 0)
    return ids_C, weights_C.div_(weights_C.sum())


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of seed and position only."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def _is_finite(logits_RV: Tensor) -> list[bool]:
    """Of each row. NaN and infinity survive a sum, and numbers that are neither cannot make one in float64."""
    finite: list[bool] = logits_RV.sum(dim=-1, dtype=torch.float64).isfinite().tolist()
    return finite


def _adjusts(sampling: SamplingParams) -> bool:
    """Whether bias or penalties change the logits before anything else does."""
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def _likeliest(logits_BV: Tensor) -> Tensor:
    """`argmax` of each row [B]: the best block, then the best in it, which on a CPU takes a tenth of the time."""
    width = math.gcd(logits_BV.shape[-1], _ARGMAX_BLOCK)
    blocks = logits_BV.unflatten(-1, (-1, width))
    best_B = blocks.amax(dim=-1).argmax(dim=-1)
    rows_B = torch.arange(len(logits_BV), device=logits_BV.device)
    in_block_B = blocks[rows_B, best_B].argmax(dim=-1)
    return torch.add(in_block_B, best_B, alpha=width)


def _token(logits_V: Tensor, draw: Draw) -> int:
    scores_V = adjusted(logits_V, draw) if _adjusts(draw.sampling) else logits_V
    if draw.sampling.temperature == 0:
        return int(scores_V.argmax())
    ids_C, shares_C = candidates(scores_V, draw.sampling)
    upto_C = shares_C.cumsum(dim=-1)
    # The token whose share of [0, 1) holds the number. The sum is not exactly 1; scaling by it, and strictly greater,
    # leaves no token of probability 0 to be hit.
    number = uniform(draw.seed, draw.position) * upto_C[-1]
    return int(ids_C[torch.searchsorted(upto_C, number, right=True)])


def _outside_nucleus(shares_C: Tensor, top_p: float) -> Tensor:
    """Which tokens top-p leaves out, bool [C]: the unlikeliest ones, up to a sum of 1 - top_p. Of a tie, the earliest.

    Sorting a whole vocabulary takes a CPU several milliseconds. So shares of about the same size are put into one
    bucket, the buckets' sums say in which one the edge lies, and only that one is sorted.
    """
    tail = 1 - top_p
    # As an integer, a positive float64 has its order; its first bits are the exponent and a little of the fraction.
    bucket_C = shares_C.view(torch.int64) >> _BITS_BELOW_BUCKET
    sum_upto = torch.bincount(bucket_C, weights=shares_C).cumsum(dim=-1)
    edge = torch.searchsorted(sum_upto, tail, right=True).clamp(max=len(sum_upto) - 1)
    sum_below = torch.where(edge > 0, sum_upto[edge - 1], 0)
    places_E = (bucket_C == edge).nonzero()[:, 0]
    ascending_E, order_E = shares_C[places_E].sort(stable=True)
    is_out_E = ascending_E.cumsum(dim=-1) + sum_below <= tail
    # The likeliest token stays, whatever the sums of its like are rounded to.
    is_out_E[-1:] = False
    outside_C = bucket_C < edge
    outside_C[places_E[order_E[is_out_E]]] = True
    return outside_C


def _add_logprobs(sampled: list[Sampled | None], logits_BV: Tensor, draws: Rows[Draw]) -> None:
    """Replace the tokens that want log-probabilities by ones that have them."""
    wanted = [
        (row, given.token_id, count)
        for row, (given, draw) in enumerate(zip(sampled, draws, strict=True))
        if given is not None and (count := draw.sampling.logprobs) is not None
    ]
    if not wanted:
        return
    rows, token_ids, counts = (list(column) for column in zip(*wanted, strict=True))
    logits_RV = logits_BV[rows].float()
    total_R = _log_totals(logits_RV)
    chosen_R = _chosen(logits_RV, token_ids, total_R).tolist()
    top = logits_RV.topk(min(max(counts), logits_RV.shape[-1]), dim=-1)
    top_ids, top_logprobs = top.indices.tolist(), (top.values.double() - total_R[:, None]).tolist()
    for index, row in enumerate(rows):
        pairs = tuple(zip(top_ids[index], top_logprobs[index], strict=True))
        sampled[row] = Sampled(token_ids[index], chosen_R[index], pairs[: counts[index]])


def _log_totals(logits_RV: Tensor) -> Tensor:
    """What turns logits into log-probabilities when it is subtracted, float64 [R].

    Never below the largest logit, so that no log-probability is above 0; differences of any two fit in float64.
    """
    return logits_RV.logsumexp(dim=-1).double()


def _chosen(logits_RV: Tensor, token_ids: Rows[int], total_R: Tensor) -> Tensor:
    """The log-probability of one token per row, float64 [R]."""
    return logits_RV[range(len(token_ids)), list(token_ids)].double() - total_R
