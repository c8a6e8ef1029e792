"""The best low-rank factors of a weighted sum (Eckart and Young 1936), and how factors are scaled to be rounded.

Factors are reduced by QR and a small singular value decomposition, a matrix by the eigenvectors of its Gram matrix. The
latter sees nothing below 1e-8 of the largest singular value: whoever needs the error measures it. Letters as in
`weighted_sum`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from cluster.lora.weighted_sum import UNIT, WeightedSum


def truncated(total: WeightedSum, rank: int) -> tuple[Tensor, Tensor]:
    """Float64 factors [M, R] and [N, R] of the nearest delta of at most `rank` columns, the heaviest column first.

    A sum that has no more columns is given back as it is. Columns that are nothing but rounding are left out; one is
    always there.
    """
    if total.factors is not None:
        if total.factors[0].shape[1] <= rank:
            return total.factors
        return _significant(*_from_factors(*total.factors, rank))
    assert total.dense_MN is not None
    num_out, num_in = total.shape
    if num_in <= num_out:
        return _significant(*_from_matrix(total.dense_MN, rank))
    right_NR, left_MR = _from_matrix(total.dense_MN.T, rank)
    return _significant(left_MR, right_NR)


def _from_factors(x_MK: Tensor, y_NK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q_MK, upper_KK = torch.linalg.qr(x_MK)
    p_NK, other_KK = torch.linalg.qr(y_NK)
    u_KK, s_K, vt_KK = torch.linalg.svd(upper_KK @ other_KK.T)
    return q_MK @ (u_KK[:, :rank] * s_K[:rank]), p_NK @ vt_KK[:rank].T


def _from_matrix(dense_MN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # The product with the largest number first keeps the squares in range.
    scale = power_of_two(float(dense_MN.abs().max()))
    scaled_MN = dense_MN / scale
    _, vectors_NN = torch.linalg.eigh(scaled_MN.T @ scaled_MN)
    right_NR = vectors_NN[:, -rank:].flip(1)
    return dense_MN @ right_NR, right_NR


def _significant(left_MR: Tensor, right_NR: Tensor) -> tuple[Tensor, Tensor]:
    weights_R = torch.linalg.vector_norm(left_MR, dim=0) * torch.linalg.vector_norm(right_NR, dim=0)
    is_kept = weights_R > UNIT * max(len(left_MR), len(right_NR)) * weights_R.max()
    is_kept[0] = True
    return left_MR[:, is_kept], right_NR[:, is_kept]


def balanced(left_MR: Tensor, right_NR: Tensor) -> tuple[Tensor, Tensor, float]:
    """`left` and `right` with columns of about equal norm and numbers of at most about 1, and their product's scale.

    Everything is multiplied by powers of two only, and the scale is one that fp32 holds: their product stays exact. The
    layers of an adapter share few scales, which on disk and on the wire are exceptions by name.
    """
    left_norms_R = torch.linalg.vector_norm(left_MR, dim=0)
    right_norms_R = torch.linalg.vector_norm(right_NR, dim=0)
    scale = power_of_two(float((left_norms_R * right_norms_R).max()), exponent_step=8)
    size_R = (left_norms_R / scale * right_norms_R).sqrt()
    is_there = size_R > 0
    factor_R = _powers_of_two(torch.where(is_there, size_R / right_norms_R, 1.0))
    # Where one is nothing, whatever is in the other could leave the range of what is served.
    left_MR = torch.where(is_there, left_MR / scale / factor_R, 0.0)
    return left_MR, torch.where(is_there, right_NR * factor_R, 0.0), scale


def _powers_of_two(x_R: Tensor) -> Tensor:
    _, exponents = np.frexp(x_R.numpy())
    return torch.from_numpy(np.ldexp(1.0, exponents))


def power_of_two(x: float, exponent_step: int = 1) -> float:
    """The least above x whose exponent is a multiple of the step, or the nearest to it that fp32 holds; 1 for 0."""
    if not x:
        return 1.0
    _, exponent = math.frexp(x)
    least, most = -126 // exponent_step + 1, 127 // exponent_step
    return math.ldexp(1.0, min(max(-(-exponent // exponent_step), least), most) * exponent_step)
