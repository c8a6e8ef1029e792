"""One shard: maps the adapters that placement gives it, hands them out as their files' bytes, and reduces mixtures.

Everything it holds can be read again from the root, so a restarted shard needs nothing from its predecessor. It imports
neither torch nor Ray at its start: it is back in the time that a Python process takes. The first share of a mixture
imports torch.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UnknownDomain, ZephyraError
from cluster.lora.byte_lru import ByteLru
from cluster.lora.packed_adapter import PackedAdapter, pack
from cluster.lora.parts import Part
from cluster.messages import AdapterRef
from deployments.joined import Joined

SHARD_BYTES = 2**30
"""Adapters that a shard keeps mapped, so that they are not checked again; what was used longest ago goes first."""

_REDUCED_AT_ONCE = 32
"""Adapters of a share that are unpacked at the same time."""


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The adapter is there but exceeds what the answer may hold: ask for it by reference."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """What asking for one adapter gave: its bytes, or why there are none."""

    ref: AdapterRef
    result: PackedAdapter | TooLarge | ZephyraError


def folder_of(root: Path, ref: AdapterRef) -> Path:
    """Where the files of `ref` lie."""
    return root / "adapters" / ref.domain / str(ref.version)


class AdapterShard:
    """Serves one shard's share of the adapters below `root`."""

    def __init__(self, root: str, max_bytes: int = SHARD_BYTES) -> None:
        self._root = Path(root)
        self._kept: ByteLru[AdapterRef, PackedAdapter] = ByteLru(max_bytes)
        # A caller that does not wait long enough finds the adapter there when it asks again.
        self._read = Joined(self._read_one)

    async def get(self, ref: AdapterRef, most_bytes: int | None = None) -> Fetched:
        """The adapter, or why it cannot be had; one of more than `most_bytes` is named, not sent."""
        packed = self._kept.get(ref) or await self._read.ask(ref)
        if isinstance(packed, PackedAdapter) and most_bytes is not None and packed.num_bytes > most_bytes:
            return Fetched(ref, TooLarge(packed.num_bytes))
        return Fetched(ref, packed)

    async def reduce(self, entries: tuple[tuple[AdapterRef, float], ...]) -> Part | ZephyraError:
        """The weighted sum of these adapters, or why it cannot be had: one that is missing fails them all."""
        part: Part | None = None
        try:
            for start in range(0, len(entries), _REDUCED_AT_ONCE):
                share = entries[start : start + _REDUCED_AT_ONCE]
                found = [(await self.get(ref)).result for ref, _ in share]
                part = await asyncio.to_thread(_reduced, part, found, [weight for _, weight in share])
        except ZephyraError as error:
            return error
        assert part is not None, "a share has adapters"
        return part

    async def _read_one(self, ref: AdapterRef) -> PackedAdapter | ZephyraError:
        try:
            packed = await asyncio.to_thread(_packed, self._root, ref)
        except ZephyraError as error:
            return error
        self._kept.put(ref, packed, packed.num_bytes)
        return packed


def _packed(root: Path, ref: AdapterRef) -> PackedAdapter:
    folder = folder_of(root, ref)
    if not folder.is_dir():
        raise UnknownDomain(f"There is no adapter {ref}; ask for a version that was published.")
    return pack(folder)


def _reduced(
    part: Part | None, found: Sequence[PackedAdapter | TooLarge | ZephyraError], weights: Sequence[float]
) -> Part:
    """`part` and the weighted sum of what was found; nothing is dropped. Raises the first error that was found."""
    import torch

    from cluster.lora.merging import join_parts, reduce_share
    from cluster.lora.peft_format import unpack

    adapters = []
    for packed in found:
        if isinstance(packed, ZephyraError):
            raise packed
        assert isinstance(packed, PackedAdapter), "nothing is too large for its own shard"
        adapters.append(unpack(packed, torch.float32))
    share = reduce_share(adapters, weights)
    return share if part is None else join_parts([part, share])
