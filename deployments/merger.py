"""Has each shard reduce its share of a large mixture, and merges the parts to one adapter with a certificate.

Torch is imported by the first merge, in a thread: a coordinator that only fetches starts without it.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.errors import AdapterUnavailable, ZephyraError
from cluster.lora.byte_lru import ByteLru
from cluster.lora.certificate import Certificate
from cluster.lora.packed_adapter import PackedAdapter
from cluster.lora.parts import Part
from cluster.messages import AdapterRef, Mixture
from deployments import calls
from deployments.joined import Joined

MERGE_WAIT_S = 120.0
"""The longest that a shard may take for its share, and a replica for the whole."""

MERGED_BYTES = 2**28
"""Merged mixtures that are kept for whoever asks for the same; what was used longest ago goes first."""

Entries = tuple[tuple[AdapterRef, float], ...]
"""Adapters with their weights, as `Mixture.entries`."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A mixture, and what it is to become."""

    mixture: Mixture
    rank: int
    dtype: str
    """Of the base that is to serve it, as torch names it: float32, bfloat16."""


@dataclass(frozen=True, slots=True)
class MergedMixture:
    """A mixture as one adapter, and how far that can be from the exact sum."""

    packed: PackedAdapter
    certificate: Certificate


class Merger:
    """Knows the shards; `owners` says which of them hold an adapter, the first to be asked first."""

    def __init__(self, shards: Sequence[calls.Handle], owners: Callable[[AdapterRef], Sequence[int]]) -> None:
        self._shards = [calls.method(shard, "reduce", by_reference=True) for shard in shards]
        self._owners = owners
        self._kept: ByteLru[Wanted, MergedMixture] = ByteLru(MERGED_BYTES)
        self._made = Joined(self._make)

    async def merge(self, wanted: Wanted) -> MergedMixture | ZephyraError:
        """The merged mixture, or why it cannot be had; those who ask for the same wait for one merge."""
        return self._kept.get(wanted) or await self._made.ask(wanted)

    async def _make(self, wanted: Wanted) -> MergedMixture | ZephyraError:
        try:
            parts = await self._reduced(wanted.mixture.entries, frozenset())
            merged = await asyncio.to_thread(_merged, parts, wanted)
        except ZephyraError as error:
            return error
        self._kept.put(wanted, merged, merged.packed.num_bytes)
        return merged

    async def _reduced(self, entries: Entries, away: frozenset[int]) -> list[Part]:
        """The parts that sum up to all `entries`. A shard that dies leaves its share to the next copies."""
        shares: defaultdict[int, list[tuple[AdapterRef, float]]] = defaultdict(list)
        for ref, weight in entries:
            shares[self._first_owner(ref, away)].append((ref, weight))
        parts = await asyncio.gather(*(self._share(shard, tuple(share), away) for shard, share in shares.items()))
        return [part for of_share in parts for part in of_share]

    async def _share(self, shard: int, entries: Entries, away: frozenset[int]) -> list[Part]:
        lost = AdapterUnavailable(f"Shard {shard} did not reduce its share within {MERGE_WAIT_S:g} s; try again.")
        try:
            part: Part | ZephyraError = await calls.call(
                self._shards[shard], entries, timeout_s=MERGE_WAIT_S, lost=lost
            )
        except AdapterUnavailable:
            return await self._reduced(entries, away | {shard})
        if isinstance(part, ZephyraError):
            raise part
        return [part]

    def _first_owner(self, ref: AdapterRef, away: frozenset[int]) -> int:
        owners = self._owners(ref)
        for shard in owners:
            if shard not in away:
                return shard
        raise AdapterUnavailable(
            f"The mixture cannot be merged: {ref} lies on shards {', '.join(map(str, owners))}, which did not answer; "
            "try again in a few seconds."
        )


def _merged(parts: Sequence[Part], wanted: Wanted) -> MergedMixture:
    import torch

    from cluster.lora.merging import merge_parts
    from cluster.lora.peft_format import packed

    merged = merge_parts(parts, wanted.rank, getattr(torch, wanted.dtype))
    return MergedMixture(packed(merged.weights), merged.certificate)
