"""Attention within documents and RMS normalisation, with gradients, on the native kernels.

For float32 on a CPU, and for bfloat16, which is widened on the way in; `can_attend` and `can_normalize` say where they
apply, and whoever asks has torch for the rest.
Letters: T tokens, N query heads, K key-value heads, H head size, D numbers of a row.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cluster.kernels.library import AttentionShape, native_library

_HEAD_MULTIPLE = 16
"""A head's size must be a multiple of a vector's numbers."""


def _are_floats(*tensors: Tensor) -> bool:
    are = all(t.dtype in (torch.float32, torch.bfloat16) and t.device.type == "cpu" for t in tensors)
    return are and native_library() is not None


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` takes these heads, whose last dimension is H."""
    return q.shape[-1] == v.shape[-1] and q.shape[-1] % _HEAD_MULTIPLE == 0 and _are_floats(q, k, v)


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, lengths: Sequence[int], scaling: float) -> Tensor:
    """Causal attention within each of the documents, whose lengths sum to T; shape [T, N, H]."""
    heads = q_TNH.float(), k_TKH.float(), v_TKH.float()
    out_TNH: Tensor = _Attend.apply(*heads, lengths, scaling)  # type: ignore[no-untyped-call]
    return out_TNH.to(q_TNH.dtype)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scaling: float) -> Tensor:
        q_TNH, k_TKH, v_TKH = q.contiguous(), k.contiguous(), v.contiguous()
        starts = torch.tensor([0, *lengths]).cumsum(0)
        assert starts[-1] == len(q_TNH), "the documents are all there is"
        shape = AttentionShape(q_TNH.shape[1], k_TKH.shape[1], q_TNH.shape[2], scaling)
        out_TNH, log_sums_TN = torch.empty_like(q_TNH), torch.empty(q_TNH.shape[:2])
        inputs = (q_TNH.data_ptr(), k_TKH.data_ptr(), v_TKH.data_ptr(), starts.data_ptr(), len(lengths))
        _library().zephyra_attend(shape, *inputs, out_TNH.data_ptr(), log_sums_TN.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, starts, out_TNH, log_sums_TN)
        ctx.shape, ctx.num_documents = shape, len(lengths)
        return out_TNH

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_TNH, k_TKH, v_TKH, starts, out_TNH, log_sums_TN = ctx.saved_tensors
        d_out_TNH = d_out.contiguous()
        dq_TNH, dk_TKH, dv_TKH = torch.empty_like(q_TNH), torch.zeros_like(k_TKH), torch.zeros_like(v_TKH)
        inputs = (q_TNH.data_ptr(), k_TKH.data_ptr(), v_TKH.data_ptr(), starts.data_ptr(), ctx.num_documents)
        kept = (out_TNH.data_ptr(), log_sums_TN.data_ptr(), d_out_TNH.data_ptr())
        gradients = (dq_TNH.data_ptr(), dk_TKH.data_ptr(), dv_TKH.data_ptr())
        _library().zephyra_attend_back(ctx.shape, *inputs, *kept, *gradients, torch.get_num_threads())
        return dq_TNH, dk_TKH, dv_TKH, None, None


def can_normalize(x: Tensor, weight_D: Tensor) -> bool:
    """Whether `normalize` takes these rows."""
    return _are_floats(x, weight_D)


def normalize(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """RMS normalisation over the last dimension, D, by frozen weights: no gradient reaches them."""
    out: Tensor = _Normalize.apply(x.float(), weight_D.float(), epsilon)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        x, size = given.contiguous(), given.shape[-1]
        out = torch.empty_like(x)
        ends = (x.numel() // size, size, epsilon)
        _library().zephyra_normalize(x.data_ptr(), weight_D.data_ptr(), *ends, out.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(x, weight_D)
        ctx.ends = ends
        return out

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        x, weight_D = ctx.saved_tensors
        d_out, dx = given.contiguous(), torch.empty_like(x)
        rows = (x.data_ptr(), weight_D.data_ptr(), d_out.data_ptr())
        _library().zephyra_normalize_back(*rows, *ctx.ends, dx.data_ptr(), torch.get_num_threads())
        return dx, None, None


def _library() -> ctypes.CDLL:
    library = native_library()
    assert library is not None, "asked for by can_attend or can_normalize"
    return library
