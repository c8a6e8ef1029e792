"""One shard: maps the adapters that placement gives it, hands them out as their files' bytes, and reduces mixtures.

Everything it holds can be read again from the root, so a restarted shard needs nothing from its predecessor. It imports
neither torch nor Ray at its start: it is back in the time that a Python process takes. The first share of a mixture
imports torch.
"""

import asyncio
import resource
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster.config.places import Root
from cluster.errors import ZephyraError
from cluster.lora.artifacts import Store
from cluster.lora.byte_lru import ByteLru
from cluster.lora.merge_plan import LayerShares
from cluster.lora.packed_adapter import TENSORS_FILE, PackedAdapter, pack
from cluster.lora.parts import LayerProjection, Part, Scaled
from cluster.messages import AdapterRef
from deployments.shards.joined import Joined

if TYPE_CHECKING:
    from cluster.lora.sketching import Ask, Sums
    from deployments.shards.mixture_share import Share

SHARD_BYTES = 2**30
"""Adapters that a shard keeps mapped, so that they are not checked again; what was used longest ago goes first."""

Entries = tuple[tuple[AdapterRef, float], ...]
"""Adapters with their weights, as `Mixture.entries`."""

ShareSizes = tuple[str, Mapping[str, LayerShares]]
"""The base's fingerprint, and what a share holds of each layer."""

SketchAnswer = Mapping[str, Scaled] | Mapping[str, LayerProjection]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The adapter is there but exceeds what the answer may hold: ask for it by reference."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """What asking for one adapter gave: its bytes, or why there are none."""

    ref: AdapterRef
    result: PackedAdapter | TooLarge | ZephyraError


class AdapterShard:
    """Serves one shard's share of the adapters below `root`."""

    def __init__(self, root: Root, max_bytes: int = SHARD_BYTES) -> None:
        # Every adapter that is kept holds a file open, and the usual limit is 1,024 of them.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
        self._store = Store(root)
        # One at a time, in a thread of its own: merging must not keep those waiting who fetch.
        self._merging = ThreadPoolExecutor(1, "merging")
        self._kept: ByteLru[AdapterRef, PackedAdapter] = ByteLru(max_bytes)
        # A caller that does not wait long enough finds the adapter there when it asks again.
        self._read = Joined(self._read_one)
        self._sums: tuple[object, Sums] | None = None

    async def get(self, ref: AdapterRef, most_bytes: int | None = None) -> Fetched:
        """The adapter, or why it cannot be had; one of more than `most_bytes` is named, not sent."""
        packed = self._kept.get(ref) or await self._read.ask(ref)
        if isinstance(packed, PackedAdapter) and most_bytes is not None and packed.num_bytes > most_bytes:
            return Fetched(ref, TooLarge(packed.num_bytes))
        return Fetched(ref, packed)

    async def sizes(self, entries: Entries) -> ShareSizes | ZephyraError:
        """What these adapters hold of each layer, or why it cannot be said: one that is missing fails them all."""
        return await self._of_share(entries, lambda share: (share.base_fingerprint, share.sizes()))

    async def reduce(self, entries: Entries, layers: tuple[str, ...], dense: frozenset[str]) -> Part | ZephyraError:
        """The weighted sum of some layers of these adapters, `dense` as in `merging.reduce_share`; or why not."""
        return await self._of_share(entries, lambda share: share.reduced(layers, dense))

    async def sketch(self, entries: Entries, layers: tuple[str, ...], ask: "Ask") -> SketchAnswer | ZephyraError:
        """What a merge by sketch asks of the same sum, which is kept for its next ask; or why not."""
        key = (entries, layers)

        def answer(share: "Share") -> SketchAnswer:
            kept = self._sums
            if kept is None or kept[0] != key:
                kept = self._sums = (key, share.sums(layers))
            return ask.answer(kept[1])

        return await self._of_share(entries, answer)

    async def _of_share(self, entries: Entries, work: Callable[["Share"], T]) -> T | ZephyraError:
        found = [(await self.get(ref)).result for ref, _ in entries]
        packed = [one for one in found if isinstance(one, PackedAdapter)]
        for one in found:
            if isinstance(one, ZephyraError):
                return one
        weights = [weight for _, weight in entries]

        def worked() -> T:
            files = [self._store.adapter_folder(ref) / TENSORS_FILE for ref, _ in entries]
            return _worked(work, files, packed, weights)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._merging, worked)
        except ZephyraError as error:
            return error

    async def _read_one(self, ref: AdapterRef) -> PackedAdapter | ZephyraError:
        try:
            packed = await asyncio.to_thread(lambda: pack(self._store.adapter_folder(ref)))
        except ZephyraError as error:
            return error
        self._kept.put(ref, packed, packed.num_bytes)
        return packed


def _worked(
    work: Callable[["Share"], T], files: Sequence[Path], packed: Sequence[PackedAdapter], weights: Sequence[float]
) -> T:
    from deployments.shards.mixture_share import Share

    return work(Share(files, packed, weights))
