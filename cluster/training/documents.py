"""Documents one after the other in one long row, none of which sees another: no padding, and no attention computed that
a mask would throw away. For any model that takes its attention from transformers' table.

Letters: T tokens, N query heads, K key-value heads, H head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

_NAME = "zephyra_documents"


def document_attention(
    q_NTH: Tensor, k_KTH: Tensor, v_KTH: Tensor, lengths: Sequence[int], scaling: float
) -> Tensor:
    """Causal attention within each of the documents, whose lengths sum to T. Shape [T, N, H]."""
    pieces = [
        nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*(x.split(list(lengths), dim=1) for x in (q_NTH, k_KTH, v_KTH)), strict=True)
    ]
    return torch.cat(pieces, dim=2)[0].transpose(0, 1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: heads [1, N or K, T, H]; the answer [1, T, N, H]."""
    out_TNH = document_attention(query[0], key[0], value[0], kwargs["document_lengths"], kwargs["scaling"])
    return out_TNH[None], None


AttentionInterface.register(_NAME, _attend)


def takes_documents(model: PreTrainedModel) -> bool:
    """Whether the model's attention is the plain causal one, and can be replaced."""
    config = model.config
    is_plain = all(getattr(config, name, None) is None for name in ("sliding_window", "attn_logit_softcapping"))
    return bool(model._supports_attention_backend) and is_plain


@contextmanager
def documents(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model attends within documents; its decoder must be given their lengths as `document_lengths`."""
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
