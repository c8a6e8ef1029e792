"""One shard's share of a large mixture: what it consists of, its weighted sum, and what a sketch asks of that.

Of each adapter only the layers at hand are read, from its mapped file. Imports torch, so the first merge imports it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.lora.merge_plan import LayerShares
from cluster.lora.merging import fingerprint_of, reduce_share, share_sums
from cluster.lora.packed_adapter import PackedAdapter
from cluster.lora.parts import Part
from cluster.lora.peft_format import layer_sizes, unpack_layers
from cluster.lora.sketching import Sums
from cluster.lora.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class Share:
    """The adapters of a share, at least one, with their weights."""

    files: Sequence[Path]
    adapters: Sequence[PackedAdapter]
    weights: Sequence[float]

    @property
    def base_fingerprint(self) -> str:
        """Of the base of all. Raises `IncompatibleAdapter` if there are several."""
        return fingerprint_of([packed.base_fingerprint for packed in self.adapters])

    def sizes(self) -> dict[str, LayerShares]:
        """What it holds of each layer, by the files' headers alone."""
        sizes: dict[str, LayerShares] = {}
        for file in self.files:
            for name, (num_out, num_in, rank) in layer_sizes(file).items():
                (columns,) = sizes[name].columns if name in sizes else (0,)
                sizes[name] = LayerShares(num_out, num_in, (columns + rank,))
        return sizes

    def reduced(self, layers: Sequence[str], dense: Collection[str]) -> Part:
        """The weighted sum of some layers; nothing is dropped. `dense` as in `reduce_share`."""
        adapters, weights = self._unpacked(layers)
        if not adapters:
            return Part({}, self.base_fingerprint)
        return reduce_share(adapters, weights, layers=layers, dense=dense)

    def sums(self, layers: Sequence[str]) -> Sums:
        """The same, to be kept here while a sketch asks about them."""
        adapters, weights = self._unpacked(layers)
        return dict(share_sums(adapters, weights, layers)) if adapters else {}

    def _unpacked(self, layers: Sequence[str]) -> tuple[list[AdapterWeights], list[float]]:
        adapters, weights = [], []
        for file, packed, weight in zip(self.files, self.adapters, self.weights, strict=True):
            if (unpacked := unpack_layers(file, packed, layers, torch.float32)) is not None:
                adapters.append(unpacked)
                weights.append(weight)
        return adapters, weights
