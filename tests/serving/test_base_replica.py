"""A base replica and where its adapters come from: messages or references, what it keeps, what it tells of itself."""

from contextlib import aclosing

import pytest

from cluster.config.serving import AppSettings
from cluster.lora.affinity import view
from cluster.messages import AdapterRef, GenerateRequest, Mixture, SamplingParams
from deployments.replica.base_replica import BaseReplica
from deployments.shards.adapter_shard import AdapterShard
from deployments.shards.coordinator import Coordinator
from tests.serving.local import LocalHandle

pytestmark = pytest.mark.anyio

LAW, MATH = AdapterRef("law", 1), AdapterRef("math", 1)


class SmallMessages(Coordinator):
    """Whatever a message may hold, no adapter fits."""

    def __init__(self, shards):
        super().__init__(shards)
        self.asked = []

    def fetch(self, refs, most_bytes=None):
        self.asked.append((refs, most_bytes is None))
        return super().fetch(refs, None if most_bytes is None else 1)


def replica_of(root, coordinator_class=Coordinator, **settings):
    coordinator = coordinator_class([LocalHandle(AdapterShard(str(root)))])
    return BaseReplica(LocalHandle(coordinator), AppSettings(root=str(root), threads=1, **settings)), coordinator


async def answered(replica, *refs):
    mixture = Mixture.of(dict.fromkeys(refs, 0.5))
    request = GenerateRequest("r", "hi", mixture, SamplingParams(max_tokens=8))
    async with aclosing(replica.generate(request)) as chunks:
        return [token async for chunk in chunks for token in chunk.token_ids]


async def test_what_no_message_holds_comes_by_reference_with_the_same_answer(root):
    plain, _ = replica_of(root)
    by_reference, coordinator = replica_of(root, SmallMessages)
    assert await answered(by_reference, LAW, MATH) == await answered(plain, LAW, MATH)
    (first, is_first_by_reference), (second, is_second_by_reference) = coordinator.asked
    # What is too large is told in the order in which the shards answer.
    assert (first, sorted(second)) == ((LAW, MATH), [LAW, MATH])
    assert (is_first_by_reference, is_second_by_reference) == (False, True)
    plain.engine.stop()
    by_reference.engine.stop()


async def test_an_adapter_that_left_its_slot_comes_back_from_memory(root):
    size = 0
    for num_slots, host_bytes, num_asks in ((None, 2**20, 1), (1, 2**20, 2), (1, 0, 3)):
        engine = {} if num_slots is None else {"engine": {"adapter_bytes": size * num_slots * 3 // 2}}
        replica, coordinator = replica_of(root, SmallMessages, host_adapter_bytes=host_bytes, **engine)
        for ref in [LAW] if num_slots is None else [LAW, MATH, LAW]:
            await answered(replica, ref)
        stats = await replica.stats()
        size = size or stats.adapter_bytes
        assert sum(by_reference for _, by_reference in coordinator.asked) == num_asks
        assert replica.engine.resident == stats.resident_adapters == (LAW,)
        replica.engine.stop()


async def test_a_replica_tells_what_it_holds_and_how_busy_it_is(root):
    replica, _ = replica_of(root)
    await answered(replica, LAW)
    request = GenerateRequest("long", "hi", Mixture(), SamplingParams(max_tokens=1000))
    async with aclosing(replica.generate(request)) as chunks:
        await anext(chunks)
        known = view("a", replica.record_routing_stats(), load=None)
    assert (known.load, known.slots, known.host) == (1, {str(LAW)}, {str(LAW)})
    assert replica.record_routing_stats()["load"] == 0
    replica.engine.stop()
