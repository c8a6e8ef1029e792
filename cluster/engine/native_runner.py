"""The runner on the native kernels: a decoder on the CPU, one call for a step. Same answers whatever runs beside.

Letters: T tokens, S sequences, B blocks of a sequence, R tokens whose logits are wanted, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from cluster.config.serving import EngineSettings
from cluster.engine.runner import num_kv_blocks
from cluster.engine.scheduler import Chunk
from cluster.kernels.decoder import NativeDecoder, StepInput, kv_block_bytes, native_decoder, why_not_native
from cluster.lora.native_mixture import NativeAdapter, native_mixtures
from cluster.lora.weights import AdapterWeights, LinearLayer, adaptable_layers
from cluster.messages import AdapterRef


class NativeRunner:
    """A packed decoder, and adapters in the kernels' layout."""

    def __init__(self, model: PreTrainedModel, decoder: NativeDecoder, num_blocks: int) -> None:
        """Made by `native_runner`."""
        self.layers: Mapping[str, LinearLayer] = adaptable_layers(model)
        self.num_kv_blocks = num_blocks
        self.kv_block_bytes = decoder.kv_block_bytes
        self._dtype = model.dtype
        self._decoder = decoder

    @property
    def weight_bytes(self) -> int:
        """Memory of the base's weights, packed."""
        return self._decoder.weight_bytes

    def prepare(self, weights: AdapterWeights) -> NativeAdapter:
        """A copy in the kernels' layout, in the base's dtype."""
        return NativeAdapter(weights, self._decoder.sites, self._dtype, self._decoder.library)

    def run(self, chunks: Sequence[Chunk], resident: Mapping[AdapterRef, NativeAdapter]) -> Tensor:
        """One forward pass over all chunks: logits, fp32 [R, V], of each one's last `num_wanted` tokens."""
        sequences = [chunk.sequence for chunk in chunks]
        lengths = [chunk.num_tokens for chunk in chunks]
        starts = [sequence.num_computed for sequence in sequences]
        token_ids: list[int] = []
        for sequence, start, length in zip(sequences, starts, lengths, strict=True):
            token_ids += sequence.tokens(start, start + length)
        ends_T = np.cumsum(lengths)
        table_SB = np.zeros((len(chunks), max(len(sequence.blocks) for sequence in sequences)), dtype=np.int64)
        for row, sequence in zip(table_SB, sequences, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        # Position of a token: where its chunk starts in the sequence, and how far into the chunk it is.
        offsets_T = np.repeat(np.array(starts) - (ends_T - lengths), lengths)
        given = StepInput(
            token_ids_T=np.array(token_ids, dtype=np.int64),
            positions_T=(np.arange(len(token_ids)) + offsets_T).astype(np.int64),
            sequences_T=np.repeat(np.arange(len(chunks), dtype=np.int64), lengths),
            blocks_SB=table_SB,
            read_from_L=np.array(
                [row for end, c in zip(ends_T, chunks, strict=True) for row in range(end - c.num_wanted, end)],
                dtype=np.int64,
            ),
        )
        mixtures = native_mixtures([sequence.mixture for sequence in sequences], lengths, resident)
        return self._decoder.run(given, mixtures.struct)

    def forget(self, ref: AdapterRef) -> None:
        """There are no other copies."""


def native_runner(model: PreTrainedModel, settings: EngineSettings, max_tokens: int) -> NativeRunner | None:
    """A native runner for `model`, which belongs to it from then on; None where the kernels cannot run it."""
    if why_not_native(model) is not None:
        return None
    num_blocks = num_kv_blocks(settings, kv_block_bytes(model), max_tokens)
    decoder = native_decoder(model, max_tokens, num_blocks)
    return None if decoder is None else NativeRunner(model, decoder, num_blocks)
