"""The coordinator and its shards: what is fetched, from whom, and what is said of the rest."""

import asyncio
import shutil
import time
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import AdapterUnavailable, CorruptArtifact, UnknownDomain
from cluster.lora.peft_format import pack
from cluster.lora.placement import shard_of
from cluster.messages import AdapterRef
from deployments.adapter_shard import AdapterShard, Fetched
from deployments.coordinator import Coordinator
from tests.nano import DOMAINS
from tests.serving.local import GoneHandle, LocalHandle

pytestmark = pytest.mark.anyio


class RecordingShard:
    """Gives an error as each adapter, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[AdapterRef, ...]] = []

    async def get(self, refs):
        self.asked.append(refs)
        for ref in refs:
            yield Fetched(ref, UnknownDomain(str(ref)))


async def fetch(coordinator, refs):
    async with aclosing(coordinator.fetch(tuple(refs))) as answers:
        return [fetched async for fetched in answers]


names = st.from_regex(r"[a-z]{1,4}", fullmatch=True)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.builds(AdapterRef, names, st.integers(1, 9)), max_size=30), st.integers(1, 5))
def test_each_ref_is_asked_once_of_its_own_shard(refs, num_shards):
    shards = [RecordingShard() for _ in range(num_shards)]

    async def scenario():
        return await fetch(Coordinator([LocalHandle(shard) for shard in shards]), refs)

    fetched = asyncio.run(scenario())
    assert sorted(f.ref for f in fetched) == sorted(set(refs))
    for index, shard in enumerate(shards):
        asked = [ref for group in shard.asked for ref in group]
        assert len(shard.asked) <= 1
        assert set(asked) == {ref for ref in refs if shard_of(ref, num_shards) == index}


async def test_what_arrives_is_what_lies_on_disk(root):
    refs = [AdapterRef(domain, 1) for domain in DOMAINS]
    coordinator = Coordinator([LocalHandle(AdapterShard(str(root))) for _ in range(2)])
    for fetched in await fetch(coordinator, refs):
        on_disk = pack(root / "adapters" / fetched.ref.domain / "1")
        assert fetched.result.config_json == on_disk.config_json
        assert fetched.result.base_fingerprint == on_disk.base_fingerprint
        assert (fetched.result.tensors == on_disk.tensors).all()


async def test_a_shard_that_is_gone_fails_its_adapters_and_no_others(root):
    gone, num_shards = GoneHandle(), 3
    refs = [AdapterRef(domain, 1) for domain in DOMAINS]
    away = shard_of(refs[0], num_shards)
    handles = [LocalHandle(AdapterShard(str(root))) for _ in range(num_shards)]
    handles[away] = gone
    start_s = time.monotonic()
    fetched = await fetch(Coordinator(handles, shard_wait_s=0.2), refs)
    assert 0.2 <= time.monotonic() - start_s < 2
    for f in fetched:
        if shard_of(f.ref, num_shards) == away:
            assert isinstance(f.result, AdapterUnavailable)
            assert str(f.ref) in str(f.result)
            assert f"Shard {away}" in str(f.result)
        else:
            assert f.result.tensors.nbytes > 0
    assert gone.num_open == 0


async def test_what_a_living_shard_holds_does_not_wait_for_a_gone_one(root):
    refs = [AdapterRef(domain, 1) for domain in DOMAINS]
    away = shard_of(refs[0], 3)
    handles = [LocalHandle(AdapterShard(str(root))) for _ in range(3)]
    handles[away] = GoneHandle()
    async with aclosing(Coordinator(handles, shard_wait_s=30).fetch(tuple(refs))) as answers:
        first = await asyncio.wait_for(anext(answers), 5)
    assert shard_of(first.ref, 3) != away


async def test_missing_and_damaged_adapters_are_stated_beside_the_good_ones(own_root):
    tensors = own_root / "adapters/math/1/adapter_model.safetensors"
    damaged = bytearray(tensors.read_bytes())
    damaged[-1] ^= 1
    tensors.write_bytes(damaged)
    shard = AdapterShard(str(own_root))
    refs = (AdapterRef("law", 1), AdapterRef("law", 7), AdapterRef("math", 1))
    results = {str(f.ref): f.result async for f in shard.get(refs)}
    assert results["law@1"].tensors.nbytes > 0
    assert isinstance(results["law@7"], UnknownDomain)
    assert isinstance(results["math@1"], CorruptArtifact)
    assert str(own_root) not in str(results["math@1"]) + str(results["law@7"])


async def test_a_shard_keeps_the_latest_within_its_bytes(own_root):
    refs = [AdapterRef(domain, 1) for domain in DOMAINS]
    one_bytes = pack(own_root / "adapters/law/1").tensors.nbytes
    shard = AdapterShard(str(own_root), max_bytes=2 * one_bytes)
    [_ async for _ in shard.get((refs[0], refs[1], refs[0], refs[2]))]
    shutil.rmtree(own_root / "adapters")
    kept = [f.ref async for f in shard.get(tuple(refs)) if not isinstance(f.result, UnknownDomain)]
    assert kept == [refs[0], refs[2]]
