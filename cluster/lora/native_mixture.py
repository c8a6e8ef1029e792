"""Adapters laid out for the native kernels, and the mixtures of a step in the kernels' own terms.

An adapter is copied once, when it becomes resident; a step names those of its rows by address and copies nothing.
Letters: T rows, I input width, O output width, R ranks of one layer, C ranks of all a site's layers.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from cluster.kernels import library as native
from cluster.kernels.decoder import Site
from cluster.lora.weights import AdapterWeights, Factors
from cluster.messages import AdapterRef, Mixture

_WIDTH = 64
"""Columns of B that lie together, in vectors of 16."""
_RANKS = 8
"""Rows of A that lie together."""
_MAX_PARTS = 3
_ALIGNMENT_BYTES = 64
_SITE = np.dtype(
    {
        "names": ["a", "scales", "b", "ranks"],
        "formats": [np.uint64, np.uint64, (np.uint64, _MAX_PARTS), (np.int64, _MAX_PARTS)],
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
        is_paired = bool(library.zephyra_is_paired(int(dtype == torch.bfloat16)))
        tensors = [_laid_out(weights, site, dtype, is_paired) for site in sites]
        sizes = [tensor.nbytes for of_site in tensors for tensor in of_site]
        starts = np.cumsum([0, *(-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes)])
        self._memory = native.LargePages(library, chunk_bytes=int(starts[-1])).take(int(starts[-1]))
        places = iter(starts.tolist())
        for row, site, of_site in zip(self._sites, sites, tensors, strict=True):
            addresses = iter([self._copied(tensor, next(places)) for tensor in of_site])
            row["a"], row["scales"] = next(addresses, 0), next(addresses, 0)
            for part, name in enumerate(site.layers):
                if (factors := weights.factors.get(name)) is not None:
                    row["b"][part], row["ranks"][part] = next(addresses), _even(factors.rank)

    @property
    def address(self) -> int:
        """Of the table of sites."""
        return self._sites.ctypes.data

    @property
    def num_bytes(self) -> int:
        """Memory of the factors."""
        return self._memory.nbytes

    def _copied(self, tensor: Tensor, place: int) -> int:
        self._memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return self._memory.data_ptr() + place


def _even(rank: int) -> int:
    """The kernels read ranks in pairs."""
    return rank + rank % 2


def _laid_out(weights: AdapterWeights, site: Site, dtype: torch.dtype, is_paired: bool) -> list[Tensor]:
    """A of all the site's layers, their scales, and B of each; nothing if the adapter leaves the site alone."""
    present = [weights.factors[name] for name in site.layers if name in weights.factors]
    if not present:
        return []
    a_CI = torch.cat([_padded(f.a_RI.to(dtype), (0, 0, 0, f.rank % 2)) for f in present])
    scales_C = torch.cat([torch.full((_even(f.rank),), f.scale) for f in present])
    missing = -len(a_CI) % _RANKS
    a_CI = _padded(a_CI, (0, -a_CI.shape[1] % 4, 0, missing))
    a = _whole(a_CI.view(-1, _RANKS, a_CI.shape[1] // 4, 4)).transpose(1, 2)
    return [a, pad(scales_C, (0, missing)), *(_columns(f, dtype, is_paired) for f in present)]


def _whole(x: Tensor) -> Tensor:
    """The last dimension as a single integer where one is that wide: numbers that stay together are copied at once."""
    width = {4: torch.int32, 8: torch.int64}.get(x.shape[-1] * x.itemsize)
    return x if width is None else x.view(width)


def _padded(x: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    """`pad`, which copies even where there is nothing to add."""
    return pad(x, margins) if any(margins) else x


def _columns(factors: Factors, dtype: torch.dtype, is_paired: bool) -> Tensor:
    """B as [O / 64][R / 2][4][a pair of ranks for 16 outputs]: what is added to 64 columns of the output lies together.

    The pair output by output, or 16 of the first rank before 16 of the second, as the kernels' packed weights have it.
    """
    b_OR = _padded(factors.b_OR.to(dtype), (0, factors.rank % 2, 0, -len(factors.b_OR) % _WIDTH))
    vectors = b_OR.contiguous().view(-1, _WIDTH // 16, 16, b_OR.shape[1] // 2, 2)
    return _whole(vectors).permute(0, 3, 1, 2, 4) if is_paired else vectors.permute(0, 3, 1, 4, 2)


@dataclass(frozen=True, slots=True)
class NativeMixtures:
    """The rows of a step by adapter. Holds the arrays that `struct` points to."""

    struct: native.Mixtures
    kept: tuple[NDArray[np.generic], ...]


def native_mixtures(
    mixtures: Sequence[Mixture], lengths: Sequence[int], resident: Mapping[AdapterRef, NativeAdapter]
) -> NativeMixtures:
    """The mixtures of sequences that have `lengths` rows each, one after the other; each ref must be in `resident`.

    Rows of the plain base meet no adapter: nothing is added to them.
    """
    rows_of: dict[AdapterRef, list[int]] = {}
    weights_of: dict[AdapterRef, list[float]] = {}
    start = 0
    for mixture, length in zip(mixtures, lengths, strict=True):
        for ref, weight in mixture.entries:
            rows_of.setdefault(ref, []).extend(range(start, start + length))
            weights_of.setdefault(ref, []).extend([weight] * length)
        start += length
    # Sorted, so that a row meets its adapters in the same order whatever else is in the step.
    refs = sorted(rows_of)
    with np.errstate(over="ignore"):  # a weight beyond fp32 becomes infinity, which is that row's own error
        weights = np.array([w for ref in refs for w in weights_of[ref]], dtype=np.float64).astype(np.float32)
    arrays = (
        np.array([resident[ref].address for ref in refs], dtype=np.int64),
        np.array([0, *np.cumsum([len(rows_of[ref]) for ref in refs])], dtype=np.int64),
        np.array([row for ref in refs for row in rows_of[ref]], dtype=np.int64),
        weights,
    )
    struct = native.Mixtures(len(refs), *(array.ctypes.data for array in arrays))
    return NativeMixtures(struct, arrays)
