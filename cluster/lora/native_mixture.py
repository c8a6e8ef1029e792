"""Adapters laid out for the native kernels, and the mixtures of a step in the kernels' own terms.

An adapter is copied once, when it becomes resident; a step names those of its rows by address and copies nothing.
Letters: T rows, I input width, O output width, C columns (ranks of a site's layers), W columns of B that lie together.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.kernels import library as native
from cluster.kernels.decoder import Site
from cluster.lora.weights import AdapterWeights
from cluster.messages import AdapterRef, Mixture

_WIDTH = 64
_MAX_PARTS = 3
_ALIGNMENT_BYTES = 64
_SITE = np.dtype(
    {
        "names": ["a", "b", "ranks", "scales"],
        "formats": [np.uint64, (np.uint64, _MAX_PARTS), (np.int64, _MAX_PARTS), (np.float32, _MAX_PARTS + 1)],
    }
)
"""As `Site` in mixture.h."""


class NativeAdapter:
    """One adapter's factors as the kernels read them, and where they lie."""

    def __init__(
        self, weights: AdapterWeights, sites: Sequence[Site], dtype: torch.dtype, library: ctypes.CDLL
    ) -> None:
        """Copies the factors, in `dtype`, to one place, in the order in which a step reads them."""
        self._sites = np.zeros(len(sites), dtype=_SITE)
        self._dtype = dtype
        tensors = [_factors(weights, site) for site in sites]
        sizes = [tensor.numel() * dtype.itemsize for of_site in tensors for tensor in of_site]
        starts = np.cumsum([0, *(-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes)])
        self._memory = native.LargePages(library, chunk_bytes=int(starts[-1])).take(int(starts[-1]))
        places = iter(starts.tolist())
        for row, site, of_site in zip(self._sites, sites, tensors, strict=True):
            addresses = iter([self._copied(tensor, next(places)) for tensor in of_site])
            row["a"] = next(addresses, 0)
            for part, name in enumerate(site.layers):
                if (factors := weights.factors.get(name)) is not None:
                    row["b"][part], row["ranks"][part], row["scales"][part] = (
                        next(addresses),
                        factors.rank,
                        factors.scale,
                    )

    @property
    def address(self) -> int:
        """Of the table of sites."""
        return self._sites.ctypes.data

    @property
    def num_bytes(self) -> int:
        """Memory of the factors."""
        return self._memory.nbytes

    def _copied(self, tensor: Tensor, place: int) -> int:
        num_bytes = tensor.numel() * self._dtype.itemsize
        self._memory[place : place + num_bytes].view(self._dtype).view(tensor.shape).copy_(tensor)
        return self._memory.data_ptr() + place


def _factors(weights: AdapterWeights, site: Site) -> list[Tensor]:
    """A of all the site's layers, one below the other, then B of each; nothing if the adapter leaves it alone."""
    present = [weights.factors[name] for name in site.layers if name in weights.factors]
    if not present:
        return []
    return [torch.cat([factors.a_RI for factors in present]), *(_side_by_side(factors.b_OR) for factors in present)]


def _side_by_side(b_OR: Tensor) -> Tensor:
    """[ceil(O / W), R, W]: what the kernel adds to W columns of the output is one stream."""
    outputs, rank = b_OR.shape
    padded = torch.nn.functional.pad(b_OR, (0, 0, 0, -outputs % _WIDTH))
    return padded.view(-1, _WIDTH, rank).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class NativeMixtures:
    """The rows of a step by mixture. Holds the arrays that `struct` points to."""

    struct: native.Mixtures
    kept: tuple[NDArray[np.generic], ...]


def native_mixtures(
    mixtures: Sequence[Mixture], lengths: Sequence[int], resident: Mapping[AdapterRef, NativeAdapter]
) -> NativeMixtures:
    """The mixtures of sequences that have `lengths` rows each, one after the other; each ref must be in `resident`.

    Rows of the plain base are in no group: nothing is added to them.
    """
    rows_of: dict[Mixture, list[int]] = {}
    start = 0
    for mixture, length in zip(mixtures, lengths, strict=True):
        if mixture.entries:
            rows_of.setdefault(mixture, []).extend(range(start, start + length))
        start += length
    groups = list(rows_of)
    entries = [entry for mixture in groups for entry in mixture.entries]
    with np.errstate(over="ignore"):  # a weight beyond fp32 becomes infinity, which is that row's own error
        weights = np.array([weight for _, weight in entries], dtype=np.float64).astype(np.float32)
    arrays = (
        np.array([0, *np.cumsum([len(rows_of[mixture]) for mixture in groups])], dtype=np.int64),
        np.array([row for mixture in groups for row in rows_of[mixture]], dtype=np.int64),
        np.array([0, *np.cumsum([len(mixture.entries) for mixture in groups])], dtype=np.int64),
        np.array([resident[ref].address for ref, _ in entries], dtype=np.int64),
        weights,
    )
    struct = native.Mixtures(len(groups), *(array.ctypes.data for array in arrays))
    return NativeMixtures(struct, arrays)
