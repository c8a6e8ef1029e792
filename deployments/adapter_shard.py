"""One shard: reads the adapters that placement gives it and hands them out as their files' bytes.

Everything it holds can be read again from the root, so a restarted shard needs nothing from its predecessor.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass

from cluster.config import Root
from cluster.errors import ZephyraError
from cluster.lora.artifacts import Store
from cluster.lora.peft_format import PackedAdapter, pack
from cluster.messages import AdapterRef

SHARD_BYTES = 2**30
"""Adapters that a shard keeps in memory; what was used longest ago goes first."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What asking for one adapter gave: its bytes, or why there are none."""

    ref: AdapterRef
    result: PackedAdapter | ZephyraError


class AdapterShard:
    """Serves one shard's share of the adapters below `root/adapters`."""

    def __init__(self, root: Root, max_bytes: int = SHARD_BYTES) -> None:
        self._store = Store(root)
        self._max_bytes = max_bytes
        self._kept: OrderedDict[AdapterRef, PackedAdapter] = OrderedDict()
        self._kept_bytes = 0

    async def get(self, refs: tuple[AdapterRef, ...]) -> AsyncIterator[Fetched]:
        """Each adapter, or its error, as it is read: one that is missing or damaged does not fail the others."""
        for ref in refs:
            yield Fetched(ref, await self._read(ref))

    async def _read(self, ref: AdapterRef) -> PackedAdapter | ZephyraError:
        if (kept := self._kept.get(ref)) is not None:
            self._kept.move_to_end(ref)
            return kept
        try:
            packed = await asyncio.to_thread(lambda: pack(self._store.adapter_folder(ref)))
        except ZephyraError as error:
            return error
        self._keep(ref, packed)
        return packed

    def _keep(self, ref: AdapterRef, packed: PackedAdapter) -> None:
        if ref in self._kept or packed.tensors.nbytes > self._max_bytes:
            return
        self._kept[ref] = packed
        self._kept_bytes += packed.tensors.nbytes
        while self._kept_bytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.tensors.nbytes
