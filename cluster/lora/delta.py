"""The formula of an exact mixture, as pure functions. Knows nothing of models, domains or files.

Letters: T rows (tokens), I input width, O output width, C columns (the ranks of all active adapters, summed),
R rank of one adapter, N active adapters.

    y = x W^T + ((x A^T) * M) B                     (LoRA: Hu et al. 2021, arXiv 2106.09685; the mask M is ours)

A LoRA delta is linear in x, so the weighted sum of the adapters' outputs equals the output of the summed weights:
a mixture is exact, with any weights and any mix of ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def mixed_delta(x_TI: Tensor, a_CI: Tensor, b_CO: Tensor, mask_TC: Tensor) -> Tensor:
    """What the mixtures of T rows add to the base's output, shape [T, O], in x's dtype."""
    return mixed_bottleneck(x_TI, a_CI, mask_TC).to(b_CO.dtype) @ b_CO


def mixed_bottleneck(x_TI: Tensor, a_CI: Tensor, mask_TC: Tensor) -> Tensor:
    """`(x A^T) * M`, fp32 [T, C]: of all layers that read x, where A holds the columns of all.

    `mask_TC` holds weight * scale in the columns of the row's adapters and 0 elsewhere. It selects rather than
    multiplies, since 0 times infinity is NaN and one adapter's overflow must not reach another's rows.
    """
    h_TC = (x_TI @ a_CI.T).float()
    return torch.where(mask_TC != 0, h_TC * mask_TC, 0.0)


def mask_columns(weights_TN: Tensor, owner_C: Tensor, scale_C: Tensor) -> Tensor:
    """Spread the rows' weights over the columns: M [T, C] with weight * alpha/r in each adapter's own columns.

    `owner_C` (int64) says which of the N active adapters a column belongs to; `scale_C` is that adapter's alpha/r.
    """
    return weights_TN[:, owner_C] * scale_C


def dense_delta(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Tensor:
    """sum_i w_i B_i A_i in float64, shape [O, I]: the slow reference. `factors` are (A [R, I], scale * B [O, R])."""
    return sum(
        (weight * (b_OR.double() @ a_RI.double()) for (a_RI, b_OR), weight in zip(factors, weights, strict=True)),
        start=torch.zeros((), dtype=torch.float64),
    )
