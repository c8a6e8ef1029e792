"""Has each shard reduce its share of a large mixture, and merges what they send to one adapter with a certificate.

The way of each layer is chosen by what it costs (cluster/lora/merge_plan.py); layers go in groups, so that neither
shards nor coordinator hold all of their matrices at once. Torch is imported by the first merge, in a thread: a
coordinator that only fetches starts without it.
"""

import asyncio
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import AdapterUnavailable, ZephyraError
from cluster.lora.byte_lru import ByteLru
from cluster.lora.certificate import Certificate
from cluster.lora.merge_plan import LayerShares, Method, plan
from cluster.lora.packed_adapter import PackedAdapter
from cluster.messages import AdapterRef, Mixture
from deployments import calls
from deployments.shards.adapter_shard import Entries
from deployments.shards.joined import Joined

if TYPE_CHECKING:
    from cluster.lora.merging import Merged

MERGE_WAIT_S = 120.0
"""The longest that a replica waits for the whole."""

ASK_WAIT_S = 30.0
"""The longest that a shard may take for one ask, of a group of layers, before a copy of it is asked."""

MERGED_BYTES = 2**28
"""Merged mixtures that are kept for whoever asks for the same; what was used longest ago goes first."""

_GROUP_NUMBERS = 2**25
"""Layers are merged in groups whose matrices have no more numbers together, or one by one."""


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

    def __init__(
        self,
        shards: Sequence[calls.Handle],
        owners: Callable[[AdapterRef], Sequence[int]],
        choose_ways: Callable[[Sequence[Mapping[str, LayerShares]], int], Mapping[str, Method]] = plan,
    ) -> None:
        self._shards = {
            name: [calls.method(shard, name, by_reference=True) for shard in shards]
            for name in ("sizes", "reduce", "sketch")
        }
        self._owners = owners
        self._choose_ways = choose_ways
        self._kept: ByteLru[Wanted, MergedMixture] = ByteLru(MERGED_BYTES)
        self._made = Joined(self._make)
        # Each holds a group's matrices on every shard and here.
        self._one_at_a_time = asyncio.Semaphore(1)

    async def merge(self, wanted: Wanted) -> MergedMixture | ZephyraError:
        """The merged mixture, or why it cannot be had; those who ask for the same wait for one merge."""
        return self._kept.get(wanted) or await self._made.ask(wanted)

    async def _make(self, wanted: Wanted) -> MergedMixture | ZephyraError:
        async with self._one_at_a_time:
            return await self._make_now(wanted)

    async def _make_now(self, wanted: Wanted) -> MergedMixture | ZephyraError:
        try:
            sizes = await self._ask("sizes", wanted.mixture.entries)
            fingerprint = await asyncio.to_thread(_one_base, [found for found, _ in sizes])
            ways = self._choose_ways([layers for _, layers in sizes], wanted.rank)
            numbers = {name: of_layer.numbers for _, layers in sizes for name, of_layer in layers.items()}
            merged = [
                await self._merged(wanted, fingerprint, way, layers)
                for way in Method
                for layers in _grouped((name for name, chosen in ways.items() if chosen is way), numbers)
            ]
            whole = await asyncio.to_thread(_whole, merged)
        except ZephyraError as error:
            return error
        self._kept.put(wanted, whole, whole.packed.num_bytes)
        return whole

    async def _merged(self, wanted: Wanted, fingerprint: str, way: Method, layers: tuple[str, ...]) -> "Merged":
        """A group of layers, all merged in one way."""
        if way is Method.RANDOMIZED:
            return await self._sketched(wanted, fingerprint, layers)
        dense = frozenset(layers if way is Method.DENSE_SUM else ())
        parts = await self._ask("reduce", wanted.mixture.entries, layers, dense)
        return await asyncio.to_thread(_merged_parts, parts, wanted)

    async def _sketched(self, wanted: Wanted, fingerprint: str, layers: tuple[str, ...]) -> "Merged":
        merging = await asyncio.to_thread(_sketching, fingerprint, wanted)
        answers: list[Any] | None = None
        while True:
            ask, merged = await asyncio.to_thread(_advanced, merging, answers)
            if merged is not None:
                return merged
            answers = await self._ask("sketch", wanted.mixture.entries, layers, ask)

    async def _ask(self, what: str, entries: Entries, *args: object, away: frozenset[int] = frozenset()) -> list[Any]:
        """What the shards say of their shares of `entries`. A shard that dies leaves its share to the next copies."""
        shares: defaultdict[int, list[tuple[AdapterRef, float]]] = defaultdict(list)
        for ref, weight in entries:
            shares[self._first_owner(ref, away)].append((ref, weight))

        async def of_share(shard: int, share: Entries) -> list[Any]:
            lost = AdapterUnavailable(f"Shard {shard} did not answer within {ASK_WAIT_S:g} s; try again.")
            try:
                answer = await calls.call(self._shards[what][shard], share, *args, timeout_s=ASK_WAIT_S, lost=lost)
            except AdapterUnavailable:
                return await self._ask(what, share, *args, away=away | {shard})
            if isinstance(answer, ZephyraError):
                raise answer
            return [answer]

        answers = await asyncio.gather(*(of_share(shard, tuple(share)) for shard, share in shares.items()))
        return [answer for of_one in answers for answer in of_one]

    def _first_owner(self, ref: AdapterRef, away: Collection[int]) -> int:
        owners = self._owners(ref)
        for shard in owners:
            if shard not in away:
                return shard
        raise AdapterUnavailable(
            f"The mixture cannot be merged: {ref} lies on shards {', '.join(map(str, owners))}, which did not answer; "
            "try again in a few seconds."
        )


def _grouped(names: Iterable[str], numbers: dict[str, int]) -> list[tuple[str, ...]]:
    groups: list[tuple[str, ...]] = []
    left = 0
    for name in names:
        left -= numbers[name]
        if not groups or left < 0:
            groups.append(())
            left = _GROUP_NUMBERS - numbers[name]
        groups[-1] += (name,)
    return groups


def _one_base(fingerprints: list[str]) -> str:
    from cluster.lora.merging import fingerprint_of

    return fingerprint_of(fingerprints)


def _merged_parts(parts: list[Any], wanted: Wanted) -> "Merged":
    import torch

    from cluster.lora.merging import merge_parts

    return merge_parts(parts, wanted.rank, getattr(torch, wanted.dtype))


def _sketching(fingerprint: str, wanted: Wanted) -> Any:
    import torch

    from cluster.lora.sketching import merge_by_sketch

    seed = zlib.crc32(wanted.mixture.key.encode())
    return merge_by_sketch(fingerprint, wanted.rank, getattr(torch, wanted.dtype), seed)


def _advanced(merging: Any, answers: list[Any] | None) -> tuple[Any, "Merged | None"]:
    """The next ask, or the end: a StopIteration could not leave a thread."""
    try:
        return merging.send(answers), None
    except StopIteration as end:
        return None, end.value


def _whole(merged: "list[Merged]") -> MergedMixture:
    from cluster.lora.merging import joined_layers
    from cluster.lora.peft_format import packed

    whole = joined_layers(merged)
    return MergedMixture(packed(whole.weights), whole.certificate)
