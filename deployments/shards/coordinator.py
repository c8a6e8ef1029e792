"""Finds the shards that hold the adapters a replica lacks, asks them all at once, and states what is missing.

Whoever asks for an adapter that is on its way already joins the ask under way. Of an adapter's copies the next is asked
when the one before is slow or gone.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial

from cluster.config.serving import FetchSettings
from cluster.errors import AdapterUnavailable, ZephyraError
from cluster.lora.placement import owners_of
from cluster.messages import AdapterRef
from deployments import calls
from deployments.shards.adapter_shard import Fetched
from deployments.shards.hedging import Pace, race
from deployments.shards.joined import Joined
from deployments.shards.merger import MergedMixture, Merger, Wanted

SHARD_WAIT_S = 1.0
"""Copies that give no adapter for so long are taken to be away; Serve starts a shard anew within seconds."""

_ASK_AGAIN_AFTER_S = 0.05


class Coordinator:
    """Knows the shards; `shards[i]` is the handle of the shard that placement calls i."""

    def __init__(
        self,
        shards: Sequence[calls.Handle],
        settings: FetchSettings = FetchSettings(),
        shard_wait_s: float = SHARD_WAIT_S,
    ) -> None:
        self._settings = settings
        self._shard_wait_s = shard_wait_s
        self._in_message = [calls.method(shard, "get") for shard in shards]
        self._by_reference = [calls.method(shard, "get", by_reference=True) for shard in shards]
        self._pace_in_message, self._pace_by_reference = Pace(), Pace()
        self._brought = Joined(self._bring)
        self._merger = Merger(shards, self._owners)

    def reconfigure(self, user_config: Mapping[str, object]) -> None:
        """Called by Serve with what the configuration says now, on the running system."""
        self._settings = FetchSettings.model_validate(user_config)

    async def fetch(self, refs: tuple[AdapterRef, ...], most_bytes: int | None = None) -> AsyncGenerator[Fetched, None]:
        """Every adapter of `refs` once, or why it is missing, in the order in which the shards answer.

        One of more than `most_bytes` is named, not sent.
        """
        for answer in asyncio.as_completed([self._brought.ask((ref, most_bytes)) for ref in dict.fromkeys(refs)]):
            yield await answer

    async def merge(self, wanted: Wanted) -> MergedMixture | ZephyraError:
        """A mixture of many adapters as one, or why it cannot be had."""
        return await self._merger.merge(wanted)

    def _owners(self, ref: AdapterRef) -> tuple[int, ...]:
        return owners_of(ref, len(self._in_message), self._settings.copies)

    async def _bring(self, key: tuple[AdapterRef, int | None]) -> Fetched:
        """One adapter, from the first of its copies that has it. A copy that is gone is asked again: it may be back."""
        ref, most_bytes = key
        owners = self._owners(ref)
        asks = [partial(self._ask, owner, ref, most_bytes) for owner in owners]
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._shard_wait_s
        while True:
            outcome = await race(asks, _is_there, self._hedge_delay_s(most_bytes), timeout_s=end_s - loop.time())
            if outcome.good is not None:
                return outcome.good
            for stated in outcome.bad:
                if not isinstance(stated.result, AdapterUnavailable):
                    return stated
            if loop.time() + _ASK_AGAIN_AFTER_S >= end_s:
                return Fetched(ref, self._unavailable(ref, owners))
            await asyncio.sleep(_ASK_AGAIN_AFTER_S)

    async def _ask(self, shard: int, ref: AdapterRef, most_bytes: int | None) -> Fetched:
        """What one shard says, `AdapterUnavailable` if it says nothing."""
        lost = self._unavailable(ref, (shard,))
        start_s = asyncio.get_running_loop().time()
        handles = self._by_reference if most_bytes is None else self._in_message
        try:
            fetched: Fetched = await calls.call(
                handles[shard], ref, most_bytes, timeout_s=self._shard_wait_s, lost=lost
            )
        except ZephyraError as error:
            return Fetched(ref, error)
        if _is_there(fetched):
            self._pace(most_bytes).note(asyncio.get_running_loop().time() - start_s)
        return fetched

    def _pace(self, most_bytes: int | None) -> Pace:
        return self._pace_by_reference if most_bytes is None else self._pace_in_message

    def _hedge_delay_s(self, most_bytes: int | None) -> float:
        fixed_ms = self._settings.hedge_ms
        return self._pace(most_bytes).hedge_delay_s if fixed_ms is None else fixed_ms / 1000

    def _unavailable(self, ref: AdapterRef, shards: Sequence[int]) -> AdapterUnavailable:
        which = f"Shard {shards[0]}" if len(shards) == 1 else f"Shards {', '.join(map(str, shards))}"
        return AdapterUnavailable(
            f"{which}, which should hold {ref}, did not answer within {self._shard_wait_s:g} s; try again in a few "
            "seconds."
        )


def _is_there(fetched: Fetched) -> bool:
    return not isinstance(fetched.result, ZephyraError)
