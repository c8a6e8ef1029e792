"""Prototypes as they are scored: only the rows that there are, as 16-bit whole numbers.

Sums of products of whole numbers are exact in any order, so a domain's logit does not depend by a bit on how many
domains or texts are beside it, nor on how the machine adds. And they are half the bytes of floats: to read them is what
takes the time among ten thousand domains. Knows nothing of text or names. Letters: B texts, D domains, P prototypes of
a domain, R prototypes of all domains, V width.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cluster.kernels import library as native

ONE = 2**15
"""What 1 is in fixed point. A sum of products stays below 2^31 as long as the lengths' product does below 2."""

MAX_LENGTH = 1.4
"""Of a row. A key has the square root of 2: a unit vector beside a unit sketch."""

_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Run:
    """Domains that stand one after another, old ones or fresh ones: from `first` to before `last`."""

    is_fresh: bool
    first: int
    last: int


def runs(numbers: Sequence[int], num_old: int) -> list[Run]:
    """`numbers` as the fewest runs, in order; those from `num_old` on number the fresh ones."""
    given = np.asarray(numbers, dtype=np.int64)
    is_next = (np.diff(given) == 1) & (given[1:] != num_old)
    found = []
    for part in np.split(given, np.flatnonzero(~is_next) + 1):
        if len(part):
            is_fresh = bool(part[0] >= num_old)
            first = int(part[0]) - (num_old if is_fresh else 0)
            found.append(Run(is_fresh, first, first + len(part)))
    return found


@dataclass(frozen=True, slots=True)
class FixedPrototypes:
    """The prototypes of all domains, one after another; never changed."""

    rows_RV: Tensor
    starts: Tensor
    """int64 [D + 1]: where each domain's rows begin."""
    sources: tuple[tuple[Tensor, int], ...]
    """What they were made from, and how often each had been written to by then."""

    @classmethod
    def of(cls, prototypes_DPV: Tensor, num_prototypes_D: Tensor) -> Self:
        """Of vectors of `MAX_LENGTH` at most; of each domain's rows those beyond its number are padding."""
        starts = _starts(num_prototypes_D)
        rows_RV = _room(int(starts[-1]), prototypes_DPV.shape[2])
        kept_DP = torch.arange(prototypes_DPV.shape[1]) < num_prototypes_D[:, None]
        # Some domains at a time, which stay in the cache.
        for first in range(0, len(prototypes_DPV), _AT_ONCE):
            last = min(first + _AT_ONCE, len(prototypes_DPV))
            kept_RV = prototypes_DPV[first:last][kept_DP[first:last]]
            rows_RV[starts[first] : starts[last]] = _fixed(kept_RV)
        return cls(rows_RV, starts, _versions((prototypes_DPV, num_prototypes_D)))

    def joined(self, fresh: Self, taken: Sequence[Run], sources: tuple[Tensor, Tensor]) -> Self:
        """The rows of these runs of domains, of this and of `fresh`, which are those of `sources`."""
        prototypes_DPV, num_prototypes_D = sources
        starts = _starts(num_prototypes_D)
        rows_RV = _room(int(starts[-1]), prototypes_DPV.shape[2])
        at = 0
        for run in taken:
            part = fresh if run.is_fresh else self
            rows = part.rows_RV[part.starts[run.first] : part.starts[run.last]]
            rows_RV[at : at + len(rows)] = rows
            at += len(rows)
        return type(self)(rows_RV, starts, _versions(sources))

    def are_of(self, *tensors: Tensor) -> bool:
        """Whether they were made from these very tensors, and these were not written to since."""
        return all(
            tensor is source and not tensor.is_inference() and _version(tensor) == version
            for tensor, (source, version) in zip(tensors, self.sources, strict=True)
        )

    def logits(self, keys_BV: Tensor, sharpness: float) -> Tensor:
        """[B, D]: the log of the mean over a domain's rows of exp(sharpness * product); keys: length 1.415 at most.

        Mostly within 3e-4 of what vectors and keys that are not rounded would give.
        """
        keys_BV, scale = _fixed(keys_BV).contiguous(), sharpness / ONE**2
        library = native.native_library()
        if library is None:
            return _log_means(self, keys_BV, scale)
        num_domains, (num_texts, width) = len(self.starts) - 1, keys_BV.shape
        logits_BD = torch.empty(num_texts, num_domains)
        prototypes = native.Prototypes(self.rows_RV.data_ptr(), self.starts.data_ptr(), num_domains, width)
        library.zephyra_log_means(keys_BV.data_ptr(), num_texts, ctypes.byref(prototypes), scale, logits_BD.data_ptr())
        return logits_BD


def _starts(num_prototypes_D: Tensor) -> Tensor:
    return torch.nn.functional.pad(num_prototypes_D.cumsum(0), (1, 0))


def _versions(tensors: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, int], ...]:
    return tuple((tensor, _version(tensor)) for tensor in tensors)


def _version(tensor: Tensor) -> int:
    # Torch does not count what is written to tensors made in inference mode.
    return -1 if tensor.is_inference() else tensor._version


def _room(num_rows: int, width: int) -> Tensor:
    """Uninitialised rows, in large pages where there are many: those are read a sixth faster."""
    num_bytes, library = 2 * num_rows * width, native.native_library()
    if library is None or num_bytes < native.PAGE_BYTES:
        return torch.empty(num_rows, width, dtype=torch.int16)
    return native.LargePages(library, num_bytes).take(num_bytes).view(torch.int16).view(num_rows, width)


def _fixed(values: Tensor) -> Tensor:
    return (values * ONE).round_().clamp_(-ONE, ONE - 1).to(torch.int16)


def _log_means(prototypes: FixedPrototypes, keys_BV: Tensor, scale: float) -> Tensor:
    """Where there is no compiler: the same in double precision, which holds the same whole numbers."""
    rows_RV, starts = prototypes.rows_RV, prototypes.starts.numpy()
    logits_BD = torch.empty(len(keys_BV), len(starts) - 1)
    for first in range(0, len(starts) - 1, _AT_ONCE):
        last = min(first + _AT_ONCE, len(starts) - 1)
        products_RB = rows_RV[starts[first] : starts[last]].double() @ keys_BV.double().T
        powers_RB = (products_RB * scale).exp_().numpy()
        sums_DB = torch.from_numpy(np.add.reduceat(powers_RB, starts[first:last] - starts[first], axis=0))
        sizes_D1 = torch.from_numpy(starts[first + 1 : last + 1] - starts[first:last])[:, None]
        logits_BD[:, first:last] = (sums_DB / sizes_D1).log_().T
    return logits_BD
