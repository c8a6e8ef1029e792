"""What shards and coordinator send one another when a mixture is merged: read-only arrays, without torch.

Letters as in `weighted_sum`; C columns that a part keeps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerPart:
    """Some shards' share of one layer: scale * left @ right.T or, where that is smaller, scale * dense."""

    factors: tuple[Array, Array] | None
    """Left [M, C] and right [N, C]."""
    dense_MN: Array | None
    scale: float
    """A power of two."""
    lost: float
    """At least the Frobenius distance between the exact share and this."""

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (self.dense_MN, *(self.factors or ())) if array is not None)


@dataclass(frozen=True, slots=True)
class Part:
    """The share of some shards, by layer."""

    layers: Mapping[str, LayerPart]
    base_fingerprint: str

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers.values())


@dataclass(frozen=True, slots=True)
class Scaled:
    """`scale * array`: numbers of any size, in the range of fp32."""

    array: Array
    scale: float
    """A power of two."""


@dataclass(frozen=True, slots=True)
class LayerProjection:
    """One shard's share D of a layer seen through a range Q on its smaller side M and P on its greater N.

    L and J columns. D = Q Z + G P^T + R.
    """

    z_NL: Scaled
    """Z^T, that is D^T Q."""
    g_MJ: Scaled
    """(D - Q Z) P."""
    is_turned: bool
    """D is the transpose of the layer's delta, which has more outputs than inputs."""
    residual: float
    """At least || R ||_F."""
    overlap: float
    """At least || Q^T R ||_F: nothing but rounding."""

    @property
    def num_bytes(self) -> int:
        return self.z_NL.array.nbytes + self.g_MJ.array.nbytes
