"""The runner in torch: any Hugging Face causal language model with full attention, on any device.

The model's own forward pass over a flat row of tokens; attention goes through `kv_cache`, linear layers through the
mixed batch. Letters: T tokens, R tokens whose logits are wanted, B sequences that decode, S tokens of a context, V
vocabulary.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cluster.config.serving import EngineSettings
from cluster.engine.block_pool import BLOCK_TOKENS
from cluster.engine.kv_cache import ATTENTION, Context, KvCache, StepContext, places_of
from cluster.engine.runner import num_kv_blocks
from cluster.engine.scheduler import Chunk
from cluster.errors import InvalidInput
from cluster.lora.linear import attach_mixed_batch
from cluster.lora.weights import AdapterWeights, Factors, LinearLayer, adaptable_layers
from cluster.messages import AdapterRef
from cluster.model.servable import attention_shape


class TorchRunner:
    """A model whose linear layers add each row's mixture, and its KV cache."""

    def __init__(self, model: PreTrainedModel, settings: EngineSettings, max_tokens: int) -> None:
        """Wrap the linear layers of `model` in place: it belongs to this runner.

        Raises `InvalidInput` for a model whose attention cannot be replaced.
        """
        if not getattr(model, "_supports_attention_backend", False):
            raise InvalidInput(
                f"The base is a {model.config.model_type}, whose attention does not go through transformers' "
                "AttentionInterface; choose one that does, such as Llama, Qwen or SmolLM."
            )
        self.layers: Mapping[str, LinearLayer] = adaptable_layers(model)
        self.weight_bytes = sum(parameter.nbytes for parameter in {*model.parameters(), *model.buffers()})
        self._mixed_batch = attach_mixed_batch(model)
        self._model = model
        config = model.config.get_text_config()
        heads, size = attention_shape(config)
        layers = int(config.num_hidden_layers)
        self.kv_block_bytes = 2 * layers * BLOCK_TOKENS * heads * size * model.dtype.itemsize
        self.num_kv_blocks = num_kv_blocks(settings, self.kv_block_bytes, max_tokens)
        like = torch.empty(0, dtype=model.dtype, device=model.device)
        self._cache = KvCache(layers, self.num_kv_blocks, heads, size, like)
        model.set_attn_implementation(ATTENTION)

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        """In the base's dtype and on its device; no copy of what is so already."""
        device, dtype = self._model.device, self._model.dtype
        factors = {
            n: Factors(f.a_RI.to(device, dtype), f.b_OR.to(device, dtype), f.scale) for n, f in weights.factors.items()
        }
        return AdapterWeights(factors, weights.base_fingerprint)

    @torch.no_grad()
    def run(self, chunks: Sequence[Chunk], resident: Mapping[AdapterRef, AdapterWeights]) -> Tensor:
        """One forward pass over all chunks: logits, fp32 [R, V], of each one's last `num_wanted` tokens."""
        # Single tokens first, which share one attention and one stack of adapters; chunks have their own.
        order = sorted(range(len(chunks)), key=lambda index: chunks[index].num_tokens > 1)
        ordered = [chunks[index] for index in order]
        device = self._model.device
        token_ids: list[int] = []
        positions: list[int] = []
        for chunk in ordered:
            start = chunk.sequence.num_computed
            token_ids += chunk.sequence.tokens(start, start + chunk.num_tokens)
            positions += range(start, start + chunk.num_tokens)
        mixtures = [chunk.sequence.mixture for chunk in ordered]
        self._mixed_batch.set_rows(mixtures, [chunk.num_tokens for chunk in ordered], resident)
        ends = dict(zip(order, accumulate(chunk.num_tokens for chunk in ordered), strict=True))
        # In the order of the chunks again.
        wanted_R = [
            row for index, chunk in enumerate(chunks) for row in range(ends[index] - chunk.num_wanted, ends[index])
        ]
        output = self._model(
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted_R, dtype=torch.long, device=device),
            step=self._context(ordered),
        )
        self._mixed_batch.clear()
        logits_RV: Tensor = output.logits[0].float()
        return logits_RV

    def forget(self, ref: AdapterRef) -> None:
        """Free the stacks that hold a copy of this adapter."""
        self._mixed_batch.forget(ref)

    def _context(self, ordered: Sequence[Chunk]) -> StepContext:
        device = self._model.device
        num_decoding = sum(chunk.num_tokens == 1 for chunk in ordered)
        places, contexts, start = [], [], 0
        for chunk in ordered:
            sequence, end = chunk.sequence, chunk.sequence.num_computed + chunk.num_tokens
            seen_S = places_of(torch.tensor(sequence.blocks, device=device), end)
            places.append(seen_S[sequence.num_computed :])
            contexts.append(Context(start, start + chunk.num_tokens, seen_S))
            start += chunk.num_tokens
        decoding = contexts[:num_decoding]
        longest = max((len(context.places_S) for context in decoding), default=0)
        padded = [torch.nn.functional.pad(c.places_S, (0, longest - len(c.places_S))) for c in decoding]
        lengths = torch.tensor([len(context.places_S) for context in decoding], device=device)
        return StepContext(
            cache=self._cache,
            places_T=torch.cat(places),
            decode_places_BS=torch.stack(padded) if padded else torch.empty(0, 0, dtype=torch.long, device=device),
            decode_seen_BS=torch.arange(longest, device=device) < lengths[:, None],
            chunks=tuple(contexts[num_decoding:]),
        )
