"""Keys and values in blocks, for torch, and attention over them under transformers' AttentionInterface.

Knows nothing of requests or adapters. Letters: T tokens of a step, B sequences, S tokens of the longest context,
N query heads, K key-value heads, H head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cluster.engine.block_pool import BLOCK_TOKENS

ATTENTION = "zephyra_blocks"
"""The name under which transformers finds `attend`."""


@dataclass(frozen=True, slots=True)
class Context:
    """The tokens of one chunk and what they may see. Rows of the step `start` to `end`."""

    start: int
    end: int
    places_S: Tensor
    """Where the sequence's tokens lie in the cache, up to the chunk's last."""


class KvCache:
    """One tensor of keys and one of values per layer, [places, kv heads, head size]; a block is 16 places in a row."""

    def __init__(self, num_layers: int, num_blocks: int, heads: int, size: int, like: Tensor) -> None:
        """In the dtype and on the device of `like`."""
        shape = (num_blocks * BLOCK_TOKENS, heads, size)
        self.keys = [like.new_empty(shape) for _ in range(num_layers)]
        self.values = [like.new_empty(shape) for _ in range(num_layers)]


@dataclass(frozen=True, slots=True)
class StepContext:
    """What attention needs to know of a step: first single tokens of different sequences, then chunks."""

    cache: KvCache
    places_T: Tensor
    """Where the step's own keys and values go."""
    decode_places_BS: Tensor
    """Of the sequences with one token each; padded with place 0."""
    decode_seen_BS: Tensor
    """Which of these places belong to the context."""
    chunks: tuple[Context, ...]


def places_of(blocks: Tensor, num_tokens: int) -> Tensor:
    """The places of the first `num_tokens` tokens of a sequence that holds `blocks`."""
    offsets = torch.arange(BLOCK_TOKENS, device=blocks.device)
    return (blocks[:, None] * BLOCK_TOKENS + offsets).flatten()[:num_tokens]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    step: StepContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Store the new keys and values [1, K, T, H], then attend with queries [1, N, T, H]; returns [1, T, N, H]."""
    assert step is not None, "the runner says what the step is"
    keys, values = step.cache.keys[module.layer_idx], step.cache.values[module.layer_idx]
    keys[step.places_T] = key[0].transpose(0, 1)
    values[step.places_T] = value[0].transpose(0, 1)
    queries_TNH = query[0].transpose(0, 1)
    num_decoding = len(step.decode_places_BS)
    outputs = []
    if num_decoding:
        seen_BS = step.decode_seen_BS
        # Zeroed where unseen: a masked place still enters a product, and what is left there may be NaN.
        hidden = ~seen_BS[:, :, None, None]
        k_BSKH = keys[step.decode_places_BS].masked_fill(hidden, 0)
        v_BSKH = values[step.decode_places_BS].masked_fill(hidden, 0)
        q_BNTH = queries_TNH[:num_decoding].unsqueeze(2)
        mask = seen_BS[:, None, None, :]
        outputs.append(_attended(q_BNTH, k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2), mask, scaling).squeeze(2))
    for chunk in step.chunks:
        num_new, length = chunk.end - chunk.start, len(chunk.places_S)
        mask = torch.ones(num_new, length, dtype=torch.bool, device=query.device).tril(length - num_new)
        q_BNTH = queries_TNH[chunk.start : chunk.end].transpose(0, 1).unsqueeze(0)
        k_BKSH = keys[chunk.places_S].transpose(0, 1).unsqueeze(0)
        v_BKSH = values[chunk.places_S].transpose(0, 1).unsqueeze(0)
        outputs.append(_attended(q_BNTH, k_BKSH, v_BKSH, mask, scaling)[0].transpose(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _attended(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    return scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, scale=scaling, enable_gqa=True)


AttentionInterface.register(ATTENTION, attend)
