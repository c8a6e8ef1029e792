"""Documents one after the other in one long row, none of which sees another: no padding, and no attention computed that
a mask would throw away. For any model that takes its attention from transformers' table; on a CPU by native kernels.

Letters: T tokens, N query heads, K key-value heads, H head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from cluster.kernels import training as kernels

_NAME = "zephyra_documents"


def document_attention(q_NTH: Tensor, k_KTH: Tensor, v_KTH: Tensor, lengths: Sequence[int], scaling: float) -> Tensor:
    """Causal attention within each of the documents, whose lengths sum to T. Shape [T, N, H]."""
    pieces = zip(*(x[None].split(list(lengths), dim=2) for x in (q_NTH, k_KTH, v_KTH)), strict=True)
    attend = partial(nn.functional.scaled_dot_product_attention, is_causal=True, scale=scaling, enable_gqa=True)
    return torch.cat([attend(q, k, v) for q, k, v in pieces], dim=2)[0].transpose(0, 1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: heads [1, N or K, T, H]; the answer [1, T, N, H]."""
    lengths, scaling = kwargs["document_lengths"], kwargs["scaling"]
    if kernels.can_attend(query, key, value):
        q_TNH, k_TKH, v_TKH = (x[0].transpose(0, 1) for x in (query, key, value))
        return kernels.attend(q_TNH, k_TKH, v_TKH, lengths, scaling)[None], None
    return document_attention(query[0], key[0], value[0], lengths, scaling)[None], None


AttentionInterface.register(_NAME, _attend)


def takes_documents(model: PreTrainedModel) -> bool:
    """Whether the model's attention is the plain causal one, and can be replaced."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    is_full = getattr(config, "sliding_window", None) is None if kinds is None else set(kinds) == {"full_attention"}
    is_plain = is_full and getattr(config, "attn_logit_softcapping", None) is None
    return bool(model._supports_attention_backend) and is_plain


@contextmanager
def documents(model: PreTrainedModel) -> Iterator[bool]:
    """Within, the model attends within documents; its decoder must be given their lengths as `document_lengths`.

    Yields False, and changes nothing, where the model's attention is of another kind: it then tells documents apart by
    their positions, as every model of transformers does.
    """
    if not takes_documents(model):
        yield False
        return
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield True
    finally:
        model.config._attn_implementation = before
