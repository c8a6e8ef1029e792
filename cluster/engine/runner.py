"""The runner: sequences in, logits out. Owns the KV cache and says which mixture each row of a pass has.

A prompt is read alone, so that it meets only its own mixture's columns; one decode step serves all running sequences.
Knows nothing of queues, sampling or text. Letters: B sequences, T tokens, S cached tokens, V vocabulary.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Rows

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cluster.engine.kv_cache import KvCache
from cluster.engine.sequence import Sequence
from cluster.errors import InvalidInput
from cluster.lora.linear import attach_mixed_batch
from cluster.lora.weights import AdapterWeights, adaptable_layers
from cluster.messages import AdapterRef

Resident = Mapping[AdapterRef, AdapterWeights]


class Runner:
    """A model whose linear layers add each row's mixture, and its KV cache."""

    def __init__(self, model: PreTrainedModel, max_rows: int, max_tokens: int) -> None:
        """Wrap the linear layers of `model` in place: a model belongs to one runner.

        Raises `InvalidInput` for a model whose attention is not full, or reads no ready-made mask.
        """
        check_attention(model, max_tokens)
        self.model = model
        self.layers = adaptable_layers(model)
        """The base's own linear layers, by name: what an adapter must fit."""
        self.mixed_batch = attach_mixed_batch(model)
        self.kv_cache = KvCache(int(model.config.num_hidden_layers), max_rows, max_tokens)

    @torch.no_grad()
    def prefill(self, sequence: Sequence, resident: Resident) -> Tensor:
        """Read the prompt of `sequence` into a new row; returns the last position's logits, fp32 [V]."""
        num_tokens = len(sequence.prompt_ids)
        self.mixed_batch.set_rows([sequence.mixture], num_tokens, resident)
        sequence.row = self.kv_cache.begin_prefill(num_tokens)
        ids_BT = torch.tensor([sequence.prompt_ids], device=self.model.device)
        positions_BT = torch.arange(num_tokens, device=self.model.device).unsqueeze(0)
        return self._forward(ids_BT, positions_BT, attention_mask=None)[0]

    @torch.no_grad()
    def decode(self, sequences: Rows[Sequence], resident: Resident) -> Tensor:
        """Read the newest token of every running sequence, in the order of rows; returns logits, fp32 [B, V]."""
        device = self.model.device
        self.mixed_batch.set_rows([sequence.mixture for sequence in sequences], 1, resident)
        positions_B = self.kv_cache.begin_decode(device)
        assert len(positions_B) == len(sequences), "a decode step covers every row"
        ids_BT = torch.tensor([[sequence.last_id] for sequence in sequences], device=device)
        beyond_BS = torch.arange(max(self.kv_cache.lengths), device=device) > positions_B[:, None]
        # Added to the scores, which every attention implementation understands alike.
        mask_BS = torch.zeros(beyond_BS.shape, dtype=self.model.dtype, device=device).masked_fill(beyond_BS, -torch.inf)
        return self._forward(ids_BT, positions_B[:, None], attention_mask=mask_BS[:, None, None, :])

    def free(self, row: int) -> None:
        """Give up a row of the KV cache; the last row takes its place."""
        self.kv_cache.free(row)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor, attention_mask: Tensor | None) -> Tensor:
        output = self.model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=attention_mask,
            past_key_values=self.kv_cache.transformers_cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV


def check_attention(model: PreTrainedModel, max_tokens: int) -> None:
    """Raise `InvalidInput` unless every layer attends to all of `max_tokens` tokens, under a ready-made mask."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and window < max_tokens
    default_kind = "sliding_attention" if windowed else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [default_kind])
    if kinds - ({"full_attention"} if windowed else {"full_attention", "sliding_attention"}):
        raise InvalidInput(
            f"The base's layers use {', '.join(sorted(kinds))} (window {window}); the engine serves full attention "
            "only: choose another base, or a context no longer than the window."
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise InvalidInput(
            f"The base was loaded with {config._attn_implementation!r} attention; load it with 'sdpa' or 'eager'."
        )
