"""One shard: maps the adapters that placement gives it and hands them out as their files' bytes.

Everything it holds can be read again from the root, so a restarted shard needs nothing from its predecessor. It imports
neither torch nor Ray: it is back in the time that a Python process takes to start.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UnknownDomain, ZephyraError
from cluster.lora.byte_lru import ByteLru
from cluster.lora.packed_adapter import PackedAdapter, pack
from cluster.messages import AdapterRef
from deployments.joined import Joined

SHARD_BYTES = 2**30
"""Adapters that a shard keeps mapped, so that they are not checked again; what was used longest ago goes first."""


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
