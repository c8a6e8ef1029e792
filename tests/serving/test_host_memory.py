"""The tier behind the slot bank: one ask for each adapter, what is kept, and what is fetched ahead, in virtual time."""

import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from cluster.errors import AdapterUnavailable, UnknownDomain
from cluster.lora.packed_adapter import PackedAdapter
from cluster.messages import AdapterRef
from deployments.replica.host_memory import HostMemory
from deployments.shards.adapter_shard import Fetched
from tests.serving.virtual_time import run

ONE_BYTES = 10
A, B, C, D = (AdapterRef(name, 1) for name in "abcd")


class Coordinator:
    """Takes a second for each call, and notes what it was asked for; `failures` are given, or raised for None."""

    def __init__(self, failures=None):
        self.asked = []
        self.failures = failures or {}

    async def fetch(self, refs):
        self.asked.append(refs)
        await asyncio.sleep(1)
        if None in self.failures:
            raise self.failures[None]
        for ref in reversed(refs):
            yield Fetched(ref, self.failures.get(ref) or packed(ref))


def packed(ref):
    tensors = np.frombuffer(bytes([ord(ref.domain)]) * ONE_BYTES, dtype=np.uint8)
    return PackedAdapter("{}", "f", tensors)


async def got(memory, *refs):
    async with aclosing(memory.get(refs)) as answers:
        return {f.ref: f.result async for f in answers}


def test_what_came_is_kept_as_a_copy_and_not_asked_for_again():
    coordinator = Coordinator()

    async def scenario():
        memory = HostMemory(coordinator.fetch, budget_bytes=2 * ONE_BYTES)
        first = await got(memory, A, B)
        return first, await got(memory, B, A), memory

    first, again, memory = run(scenario())
    assert coordinator.asked == [(A, B)]
    assert first == again
    for ref, result in first.items():
        assert result.tensors.tobytes() == packed(ref).tensors.tobytes()
        assert result.tensors.flags.owndata
    assert memory.held == (B, A)
    assert memory.used_bytes == 2 * ONE_BYTES


def test_an_adapter_on_its_way_is_joined_by_all_who_need_it_even_if_the_first_leaves():
    coordinator = Coordinator()

    async def scenario():
        memory = HostMemory(coordinator.fetch, budget_bytes=0)
        asks = [asyncio.ensure_future(got(memory, A)), asyncio.ensure_future(got(memory, B, A))]
        await asyncio.sleep(0.5)
        asks[0].cancel()
        return await asks[1], asyncio.get_running_loop().time()

    found, took_s = run(scenario())
    assert found.keys() == {A, B}
    assert took_s == pytest.approx(1.0)
    assert coordinator.asked == [(A,), (B,)]


def test_least_recently_used_leaves_but_not_what_comes_up_next():
    coordinator = Coordinator()

    async def scenario():
        memory = HostMemory(coordinator.fetch, budget_bytes=2 * ONE_BYTES)
        await got(memory, A)
        await got(memory, B)
        await got(memory, C)
        held = [memory.held]
        memory.prefetch((B,))
        await got(memory, D)
        held.append(memory.held)
        memory.prefetch((B, D))
        await got(memory, A)
        return [*held, memory.held], memory

    held, memory = run(scenario())
    assert held == [(B, C), (B, D), (B, D)]
    assert memory.used_bytes == 2 * ONE_BYTES


def test_what_comes_up_is_there_when_it_is_wanted_and_no_more_of_it_than_fits():
    coordinator = Coordinator()

    async def scenario():
        memory = HostMemory(coordinator.fetch, budget_bytes=2 * ONE_BYTES)
        await got(memory, D)  # so that sizes are known
        memory.prefetch((A, B, C))
        await asyncio.sleep(2)
        held = memory.held
        start_s = asyncio.get_running_loop().time()
        found = await got(memory, A, B)
        return held, found, asyncio.get_running_loop().time() - start_s

    held, found, took_s = run(scenario())
    assert coordinator.asked == [(D,), (A, B)]
    assert set(held) == set(found) == {A, B}
    assert took_s == 0


def test_a_prefetch_under_way_is_joined_and_without_a_budget_there_is_none():
    coordinator = Coordinator()

    async def scenario():
        memory = HostMemory(coordinator.fetch, budget_bytes=ONE_BYTES)
        memory.prefetch((A,))
        await asyncio.sleep(0.75)
        memory.prefetch((A,))
        found = await got(memory, A)
        HostMemory(coordinator.fetch, budget_bytes=0).prefetch((B,))
        await asyncio.sleep(2)
        return found

    assert run(scenario()).keys() == {A}
    assert coordinator.asked == [(A,)]


@pytest.mark.parametrize("raised", [AdapterUnavailable("The coordinator is away."), RuntimeError("a bug")])
def test_failures_are_told_to_each_who_waits_and_tried_again_later(raised):
    stating, raising = Coordinator({A: UnknownDomain("no such adapter")}), Coordinator({None: raised})

    async def scenario():
        stated = await got(HostMemory(stating.fetch, 100), A, B)
        memory = HostMemory(raising.fetch, 100)
        both = await asyncio.gather(got(memory, A, B), got(memory, B))
        raising.failures = {}
        return stated, both, await got(memory, A)

    stated, (first, second), later = run(scenario())
    assert isinstance(stated[A], UnknownDomain)
    assert isinstance(stated[B], PackedAdapter)
    assert [type(result) for result in [*first.values(), *second.values()]] == [AdapterUnavailable] * 3
    assert isinstance(later[A], PackedAdapter)
