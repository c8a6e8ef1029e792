"""Finds the shards that hold the adapters a replica lacks, asks them all at once, and states what is missing."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing

from cluster.errors import AdapterUnavailable
from cluster.lora.placement import shard_of
from cluster.messages import AdapterRef
from deployments import calls
from deployments.adapter_shard import Fetched

SHARD_WAIT_S = 1.0
"""A shard that gives no adapter for so long is taken to be away; Serve starts it anew within seconds."""

_ASK_AGAIN_AFTER_S = 0.05


class Coordinator:
    """Knows the shards; `shards[i]` is the handle of the shard that placement calls i."""

    def __init__(self, shards: Sequence[calls.Handle], shard_wait_s: float = SHARD_WAIT_S) -> None:
        # Adapters may exceed what a message may hold.
        self._shards = [calls.method(shard, "get", stream=True, by_reference=True) for shard in shards]
        self._shard_wait_s = shard_wait_s

    async def fetch(self, refs: tuple[AdapterRef, ...]) -> AsyncGenerator[Fetched, None]:
        """Every adapter of `refs` once, or the reason it is missing, in the order in which the shards answer."""
        streams = [self._ask(shard, group) for shard, group in self._by_shard(refs).items()]
        async with aclosing(calls.merge(streams)) as answers:
            async for fetched in answers:
                yield fetched

    def _by_shard(self, refs: Iterable[AdapterRef]) -> dict[int, list[AdapterRef]]:
        groups: defaultdict[int, list[AdapterRef]] = defaultdict(list)
        for ref in sorted(set(refs)):
            groups[shard_of(ref, len(self._shards))].append(ref)
        return groups

    async def _ask(self, shard: int, refs: list[AdapterRef]) -> AsyncGenerator[Fetched, None]:
        """One shard's answers. A shard that dies is asked again for the rest: reading twice does no harm."""
        loop = asyncio.get_running_loop()
        left = dict.fromkeys(refs)
        end = loop.time() + self._shard_wait_s
        while left:
            lost = AdapterUnavailable(
                f"Shard {shard}, which holds {', '.join(map(str, list(left)[:3]))}, did not answer within "
                f"{self._shard_wait_s:g} s; try again in a few seconds."
            )
            answers = calls.stream(self._shards[shard], tuple(left), lost=lost, item_timeout_s=self._shard_wait_s)
            try:
                async with aclosing(answers):
                    async for fetched in answers:
                        del left[fetched.ref]
                        end = loop.time() + self._shard_wait_s
                        yield fetched
            except AdapterUnavailable as error:
                if error is not lost or loop.time() + _ASK_AGAIN_AFTER_S >= end:
                    for ref in left:
                        yield Fetched(ref, error)
                    return
                await asyncio.sleep(_ASK_AGAIN_AFTER_S)
