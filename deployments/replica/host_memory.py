"""The tier between the shards and the slot bank: adapters in a base replica's own memory, as their files' bytes.

What the engine's queue will need next is fetched here while others decode. Knows nothing of slots, or of who answers.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from cluster.errors import AdapterUnavailable, ZephyraError
from cluster.lora.byte_lru import ByteLru
from cluster.lora.packed_adapter import PackedAdapter
from cluster.messages import AdapterRef
from deployments.shards.adapter_shard import Fetched

logger = logging.getLogger("ray.serve")

_COPIED_AT_ONCE_BYTES = 2**20
"""Up to so many a copy takes less than going to another thread and back; more would hold up the loop."""

FetchPacked = Callable[[tuple[AdapterRef, ...]], AsyncGenerator[Fetched, None]]
"""Gets adapters, or says why not: each of them once, in any order."""


class HostMemory:
    """Adapters within a budget of bytes, least recently used first. One that is on its way is not asked for again."""

    def __init__(self, fetch: FetchPacked, budget_bytes: int) -> None:
        self._fetch = fetch
        self._kept: ByteLru[AdapterRef, PackedAdapter] = ByteLru(budget_bytes)
        self._under_way: dict[AdapterRef, asyncio.Future[Fetched]] = {}
        self._upcoming: frozenset[AdapterRef] = frozenset()
        # The loop holds its tasks weakly: without these references they could vanish.
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> tuple[AdapterRef, ...]:
        """What is there, least recently used first."""
        return tuple(self._kept)

    @property
    def used_bytes(self) -> int:
        """Of what is there."""
        return self._kept.used_bytes

    async def get(self, refs: tuple[AdapterRef, ...]) -> AsyncGenerator[Fetched, None]:
        """Each adapter once, or why it cannot be had; those that are here first."""
        here = {ref: packed for ref in refs if (packed := self._kept.get(ref)) is not None}
        awaited = self._ask(ref for ref in refs if ref not in here)
        for ref, packed in here.items():
            yield Fetched(ref, packed)
        for answer in asyncio.as_completed(awaited):
            yield await answer

    def prefetch(self, refs: tuple[AdapterRef, ...]) -> None:
        """Start fetching what will be needed, the next first, as far as the budget holds it all.

        Until the next call these are spared when others need room.
        """
        fitting: list[AdapterRef] = []
        mean_bytes = self._kept.used_bytes // max(1, len(self._kept))
        left_bytes = self._kept.budget_bytes
        for ref in refs:
            packed = self._kept.get(ref)
            left_bytes -= mean_bytes if packed is None else packed.num_bytes
            if left_bytes < 0:
                break
            fitting.append(ref)
        self._upcoming = frozenset(fitting)
        if self._kept.budget_bytes:
            self._ask(ref for ref in fitting if ref not in self._kept)

    def _ask(self, refs: Iterable[AdapterRef]) -> list[asyncio.Future[Fetched]]:
        """The answers to come; one call for those that nobody has asked for yet."""
        loop = asyncio.get_running_loop()
        awaited = {ref: self._under_way.get(ref) for ref in refs}
        new = tuple(ref for ref, answer in awaited.items() if answer is None)
        self._under_way |= {ref: loop.create_future() for ref in new}
        if new:
            task = loop.create_task(self._bring(new))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        # Shielded: one who leaves takes an answer from nobody else.
        return [asyncio.shield(self._under_way[ref]) for ref in awaited]

    async def _bring(self, refs: tuple[AdapterRef, ...]) -> None:
        why: ZephyraError = AdapterUnavailable("An adapter that the request needs could not be fetched; try again.")
        try:
            async with aclosing(self._fetch(refs)) as answers:
                async for fetched in answers:
                    if isinstance(fetched.result, PackedAdapter):
                        # What came lies in Ray's object store, or in the message that brought it.
                        tensors = fetched.result.tensors
                        is_small = tensors.nbytes <= _COPIED_AT_ONCE_BYTES
                        owned = np.array(tensors) if is_small else await asyncio.to_thread(np.array, tensors)
                        packed = replace(fetched.result, tensors=owned)
                        self._kept.put(fetched.ref, packed, packed.num_bytes, spare=self._upcoming)
                        fetched = Fetched(fetched.ref, packed)
                    self._under_way.pop(fetched.ref).set_result(fetched)
        except ZephyraError as error:
            why = error
        except Exception:
            logger.exception("Fetching %s failed.", ", ".join(map(str, refs)))
        for ref in refs:
            # Whatever happened, those who wait must hear of it.
            if (answer := self._under_way.pop(ref, None)) is not None:
                answer.set_result(Fetched(ref, why))
