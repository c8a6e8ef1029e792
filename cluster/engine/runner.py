"""What runs a step: chunks of sequences in, logits out. Two ways to do the same, `native_runner` and `torch_runner`.

A runner owns the base's weights and the keys and values of all sequences; it knows nothing of queues, sampling or text.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from cluster.config.serving import EngineSettings
from cluster.engine.block_pool import blocks_for
from cluster.engine.scheduler import Chunk
from cluster.lora.weights import AdapterWeights, LinearLayer, Resident
from cluster.messages import AdapterRef

logger = logging.getLogger(__name__)


R = TypeVar("R", bound=Resident)


class Runner(Protocol[R]):
    """A model with the adapters of each row, and its KV cache."""

    layers: Mapping[str, LinearLayer]
    """The base's own linear layers, by name: what an adapter must fit."""
    num_kv_blocks: int
    """Blocks of the KV cache."""
    kv_block_bytes: int
    """Memory of one of them, in all layers."""

    @property
    def weight_bytes(self) -> int:
        """Memory of the base's weights."""
        ...

    def prepare(self, weights: AdapterWeights) -> R:
        """An adapter as the runner reads it, in the base's dtype and on its device."""
        ...

    def run(self, chunks: Sequence[Chunk], resident: Mapping[AdapterRef, R]) -> Tensor:
        """One forward pass over all chunks; the adapters of their mixtures must be in `resident`.

        Returns logits, fp32 [R, V]: of each chunk in turn, the rows of its last `num_wanted` tokens.
        """
        ...

    def forget(self, ref: AdapterRef) -> None:
        """Free whatever else holds a copy of an adapter that left the slot bank."""
        ...


def num_kv_blocks(settings: EngineSettings, block_bytes: int, max_tokens: int) -> int:
    """How many blocks the budget gives: at least one sequence's of `max_tokens`, no more than a full batch can use."""
    longest = blocks_for(max_tokens)
    affordable = settings.kv_cache_bytes // block_bytes
    if affordable < longest:
        logger.warning(
            "kv_cache_bytes is %d; one sequence of %d tokens takes %d, which is taken instead.",
            settings.kv_cache_bytes,
            max_tokens,
            longest * block_bytes,
        )
    return max(longest, min(affordable, 2 * longest * settings.max_batch_size))
