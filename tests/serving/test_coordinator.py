"""The coordinator and its shards: what is fetched, from whom, and what is said of the rest."""

import asyncio
import shutil
import subprocess
import sys
import time
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError

from cluster.config.serving import FetchSettings
from cluster.errors import AdapterUnavailable, CorruptArtifact, UnknownDomain
from cluster.lora.packed_adapter import pack
from cluster.lora.placement import owners_of, shard_of
from cluster.messages import AdapterRef
from deployments.shards.adapter_shard import AdapterShard, Fetched, TooLarge
from deployments.shards.coordinator import Coordinator
from tests.nano import DOMAINS
from tests.serving.local import GoneHandle, LocalHandle
from tests.serving.virtual_time import run

pytestmark = pytest.mark.anyio

LAW = AdapterRef("law", 1)
ONE_COPY = FetchSettings(copies=1)


class FakeShard:
    """A handle to a shard that does as it is told, call by call; the last behaviour is for all calls after it.

    A behaviour is a kind of answer and the seconds after which it comes: "there", "unknown", "corrupt", "died" or
    "never".
    """

    def __init__(self, *behaviours):
        self.behaviours = behaviours or (("there", 0.0),)
        self.asked = []
        self.num_open = 0

    def options(self, *, method_name, stream, _by_reference, **_):
        assert not stream
        return self

    def remote(self, ref, most_bytes):
        kind, after_s = self.behaviours[min(len(self.asked), len(self.behaviours) - 1)]
        self.asked.append(ref)
        return asyncio.ensure_future(self._answer(ref, kind, after_s))

    async def _answer(self, ref, kind, after_s):
        self.num_open += 1
        try:
            await asyncio.sleep(1e6 if kind == "never" else after_s)
            if kind == "died":
                raise ActorUnavailableError("gone", b"x" * 16)
            errors = {"unknown": UnknownDomain("unknown"), "corrupt": CorruptArtifact("corrupt")}
            return Fetched(ref, errors.get(kind) or TooLarge(1))
        finally:
            self.num_open -= 1


async def fetch(coordinator, refs, most_bytes=None):
    async with aclosing(coordinator.fetch(tuple(refs), most_bytes)) as answers:
        return [fetched async for fetched in answers]


def fetched_in_virtual_time(shards, refs, fetching):
    """What came, and how long it took."""

    async def scenario():
        found = await fetch(Coordinator(shards, fetching), refs)
        return found, asyncio.get_running_loop().time()

    return run(scenario())


names = st.from_regex(r"[a-z]{1,4}", fullmatch=True)
refs_lists = st.lists(st.builds(AdapterRef, names, st.integers(1, 9)), max_size=30)
behaviours = st.lists(
    st.tuples(
        st.sampled_from(["there", "unknown", "corrupt", "died", "never"]), st.sampled_from([0.0, 0.03, 0.3, 3.0])
    ),
    max_size=3,
)


@given(refs_lists, st.integers(1, 5))
def test_each_ref_is_asked_once_of_its_own_shard(refs, num_shards):
    shards = [FakeShard() for _ in range(num_shards)]
    fetched, _ = fetched_in_virtual_time(shards, refs, FetchSettings())
    assert sorted(f.ref for f in fetched) == sorted(set(refs))
    for index, shard in enumerate(shards):
        assert sorted(shard.asked) == sorted({ref for ref in refs if shard_of(ref, num_shards) == index})


@settings(max_examples=300)
@given(st.lists(behaviours, min_size=1, max_size=4), refs_lists, st.integers(1, 5))
def test_whatever_fails_in_whatever_order_each_adapter_is_given_or_said_to_be_missing(scripts, refs, copies):
    shards = [FakeShard(*script, ("there", 0.0)) for script in scripts]
    fetched, took_s = fetched_in_virtual_time(shards, refs, FetchSettings(copies=copies, hedge_ms=50))
    assert sorted(f.ref for f in fetched) == sorted(set(refs))
    assert took_s <= 1.0 + 1e-6
    assert not any(shard.num_open for shard in shards)
    for f in fetched:
        owners = owners_of(f.ref, len(shards), copies)
        assert all(f.ref not in shard.asked for index, shard in enumerate(shards) if index not in owners)
        given_by_some = any(kind == "there" for owner in owners for kind, _ in shards[owner].behaviours)
        assert given_by_some or not isinstance(f.result, TooLarge)
        if isinstance(f.result, UnknownDomain | CorruptArtifact):
            kinds = {kind for owner in owners for kind, _ in scripts[owner]}
            assert {UnknownDomain: "unknown", CorruptArtifact: "corrupt"}[type(f.result)] in kinds
        # Whoever is well and quick is asked in time, whatever the others do.
        if any(not scripts[owner] for owner in owners):
            assert isinstance(f.result, TooLarge)


def test_a_copy_helps_out_when_one_is_slow_dead_or_damaged():
    first, second = owners_of(LAW, 2, 2)
    for behaviour, least_s in (
        (("never", 0), 0.05),
        (("died", 0.0), 0.0),
        (("corrupt", 0.0), 0.0),
        (("there", 9), 0.05),
    ):
        shards = [FakeShard(), FakeShard()]
        shards[first] = FakeShard(behaviour)
        ((fetched,), took_s) = fetched_in_virtual_time(shards, [LAW], FetchSettings(hedge_ms=50))
        assert isinstance(fetched.result, TooLarge)
        assert took_s == pytest.approx(least_s)
        assert [len(shards[first].asked), len(shards[second].asked)] == [1, 1]


def test_the_only_copy_is_waited_for_and_asked_again_when_it_comes_back():
    shards = [FakeShard(("died", 0.0), ("died", 0.0), ("there", 0.01))]
    ((fetched,), took_s) = fetched_in_virtual_time(shards, [LAW], ONE_COPY)
    assert isinstance(fetched.result, TooLarge)
    assert took_s == pytest.approx(0.11)
    assert len(shards[0].asked) == 3


def test_without_a_fixed_delay_the_pace_of_the_answers_decides():
    first, second = owners_of(LAW, 2, 2)
    shards = [FakeShard(), FakeShard()]
    shards[first] = FakeShard(*[("there", 0.02)] * 100, ("never", 0))
    coordinator = Coordinator(shards)

    async def scenario():
        for _ in range(100):
            await fetch(coordinator, [LAW])
        start_s = asyncio.get_running_loop().time()
        await fetch(coordinator, [LAW])
        return asyncio.get_running_loop().time() - start_s

    assert run(scenario()) == pytest.approx(0.03)
    assert len(shards[second].asked) == 1


def test_those_who_ask_for_the_same_adapter_wait_for_one_ask_and_the_next_asks_anew():
    shard = FakeShard(("there", 0.5))
    coordinator = Coordinator([shard])

    async def scenario():
        asks = [asyncio.ensure_future(fetch(coordinator, [LAW])) for _ in range(8)]
        await asyncio.sleep(0.1)
        asks.append(asyncio.ensure_future(fetch(coordinator, [LAW, AdapterRef("math", 1)])))
        await asyncio.sleep(0.1)
        asks[0].cancel()
        found = await asyncio.gather(*asks, return_exceptions=True)
        in_time = list(shard.asked)
        await fetch(coordinator, [LAW])
        return found, in_time

    found, in_time = run(scenario())
    assert in_time == [LAW, AdapterRef("math", 1)]
    assert shard.asked == [*in_time, LAW]
    assert isinstance(found[0], asyncio.CancelledError)
    assert all(LAW in [f.ref for f in answers] for answers in found[1:])


def test_copies_change_in_place():
    shards = [FakeShard(("never", 0)), FakeShard(("never", 0))]
    first, second = owners_of(LAW, 2, 2)
    shards[second] = FakeShard()
    coordinator = Coordinator(shards, ONE_COPY)
    ((before,), (after,)) = run(_before_and_after(coordinator, {"copies": 2, "hedge_ms": 10}))
    assert isinstance(before.result, AdapterUnavailable)
    assert str(before.result).startswith(f"Shard {first}, ")
    assert isinstance(after.result, TooLarge)


async def _before_and_after(coordinator, user_config):
    before = await fetch(coordinator, [LAW])
    coordinator.reconfigure(user_config)
    return before, await fetch(coordinator, [LAW])


async def test_what_arrives_is_what_lies_on_disk(root):
    refs = [AdapterRef(domain, 1) for domain in DOMAINS]
    coordinator = Coordinator([LocalHandle(AdapterShard(str(root))) for _ in range(2)])
    for fetched in await fetch(coordinator, refs):
        on_disk = pack(root / "adapters" / fetched.ref.domain / "1")
        assert fetched.result.config_json == on_disk.config_json
        assert fetched.result.base_fingerprint == on_disk.base_fingerprint
        assert (fetched.result.tensors == on_disk.tensors).all()


async def test_what_exceeds_a_message_is_named_and_comes_by_reference(root):
    num_bytes = pack(root / "adapters/law/1").num_bytes
    coordinator = Coordinator([LocalHandle(AdapterShard(str(root)))])
    for most_bytes, is_there in ((num_bytes - 1, False), (num_bytes, True), (None, True)):
        (fetched,) = await fetch(coordinator, [LAW], most_bytes)
        assert fetched.result == TooLarge(num_bytes) if not is_there else fetched.result.num_bytes == num_bytes


async def test_a_shard_that_is_gone_fails_its_adapters_and_no_others(root):
    gone, num_shards = GoneHandle(), 3
    refs = [AdapterRef(domain, 1) for domain in DOMAINS]
    away = shard_of(refs[0], num_shards)
    handles = [LocalHandle(AdapterShard(str(root))) for _ in range(num_shards)]
    handles[away] = gone
    start_s = time.monotonic()
    fetched = await fetch(Coordinator(handles, ONE_COPY, shard_wait_s=0.2), refs)
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
    async with aclosing(Coordinator(handles, ONE_COPY, shard_wait_s=5).fetch(tuple(refs))) as answers:
        first = await asyncio.wait_for(anext(answers), 4)
    assert shard_of(first.ref, 3) != away


def test_a_shard_imports_neither_torch_nor_ray():
    """What makes it quick to come back."""
    heavy = {"torch", "ray", "transformers"}
    code = f"import sys, deployments.shards.adapter_shard; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_missing_and_damaged_adapters_are_stated_beside_the_good_ones(own_root):
    tensors = own_root / "adapters/math/1/adapter_model.safetensors"
    damaged = bytearray(tensors.read_bytes())
    damaged[-1] ^= 1
    tensors.write_bytes(damaged)
    coordinator = Coordinator([LocalHandle(AdapterShard(str(own_root)))])
    refs = (AdapterRef("law", 1), AdapterRef("law", 7), AdapterRef("math", 1))
    results = {str(f.ref): f.result for f in await fetch(coordinator, refs)}
    assert results["law@1"].tensors.nbytes > 0
    assert isinstance(results["law@7"], UnknownDomain)
    assert isinstance(results["math@1"], CorruptArtifact)
    assert str(own_root) not in str(results["math@1"]) + str(results["law@7"])


async def test_a_shard_keeps_the_latest_within_its_bytes(own_root):
    refs = [AdapterRef(domain, 1) for domain in DOMAINS]
    one_bytes = pack(own_root / "adapters/law/1").num_bytes
    shard = AdapterShard(str(own_root), max_bytes=2 * one_bytes)
    for ref in (refs[0], refs[1], refs[0], refs[2]):
        await shard.get(ref)
    shutil.rmtree(own_root / "adapters")
    kept = [ref for ref in refs if not isinstance((await shard.get(ref)).result, UnknownDomain)]
    assert kept == [refs[0], refs[2]]


async def test_a_shard_reads_an_adapter_once_for_all_who_ask_also_when_one_leaves(own_root):
    shard = AdapterShard(str(own_root))
    asks = [asyncio.ensure_future(shard.get(LAW)) for _ in range(4)]
    await asyncio.sleep(0)
    asks[0].cancel()
    found = await asyncio.gather(*asks[1:], shard.get(LAW))
    assert all(f.result.num_bytes and f.result is found[0].result for f in found)
