"""Mixtures of many adapters: merged where they lie, served as one, certified, and stated when it cannot be."""

import asyncio
from contextlib import aclosing

import pytest
import torch

from cluster.config.serving import AppSettings, EngineSettings, FetchSettings
from cluster.engine.engine import Engine
from cluster.errors import AdapterUnavailable, InvalidInput, UnknownDomain
from cluster.lora.merge_plan import Method
from cluster.lora.merging import merge_parts, reduce_share
from cluster.lora.packed_adapter import pack
from cluster.lora.peft_format import unpack
from cluster.lora.placement import owners_of
from cluster.messages import MAX_CO_BATCHED, AdapterRef, GenerateRequest, Mixture, SamplingParams
from deployments.api import grpc_api
from deployments.api.gateway import Gateway
from deployments.protos import zephyra_pb2 as pb
from deployments.replica.base_replica import BaseReplica
from deployments.shards.adapter_shard import AdapterShard
from deployments.shards.coordinator import Coordinator
from deployments.shards.merger import MergedMixture, Merger, Wanted
from tests.nano import build_root, nano_base, publish_adapter
from tests.serving.http_client import client_of
from tests.serving.local import LocalHandle, WordRouter
from tests.serving.test_coordinator import FakeShard
from tests.serving.test_grpc import Context

pytestmark = pytest.mark.anyio

REFS = [AdapterRef(f"d{index}", 1) for index in range(12)]
MIXTURE = Mixture.of({ref: (1 + index) / 64 for index, ref in enumerate(REFS)})


class CountingShard(AdapterShard):
    """Notes which shares it reduces."""

    def __init__(self, root):
        super().__init__(root)
        self.reduced = []

    async def reduce(self, entries, layers, dense):
        self.reduced.append(entries)
        await asyncio.sleep(0.05)
        return await super().reduce(entries, layers, dense)


@pytest.fixture(scope="module")
def many_root(tmp_path_factory):
    root = build_root(tmp_path_factory.mktemp("many"))
    for seed, ref in enumerate(REFS):
        publish_adapter(root, ref.domain, 100 + seed)
    return root


def loaded(root, ref):
    return unpack(pack(root / "adapters" / ref.domain / str(ref.version)), torch.float32)


def coordinator_of(root, num_shards=3, copies=2):
    shards = [CountingShard(str(root)) for _ in range(num_shards)]
    return Coordinator([LocalHandle(shard) for shard in shards], FetchSettings(copies=copies)), shards


def merged_here(root, rank):
    """The reference: one share, in this process."""
    part = reduce_share([loaded(root, ref) for ref in MIXTURE.refs], [weight for _, weight in MIXTURE.entries])
    return merge_parts([part], rank, torch.float32)


def delta(weights, name):
    f = weights.factors[name]
    return f.scale * f.b_OR.double() @ f.a_RI.double()


@pytest.mark.parametrize("rank", [64, 10])
async def test_shards_reduce_their_shares_and_the_coordinator_merges_what_one_process_would(many_root, rank):
    coordinator, shards = coordinator_of(many_root)
    merged = await coordinator.merge(Wanted(MIXTURE, rank, "float32"))
    expected, got = merged_here(many_root, rank), unpack(merged.packed, torch.float32)
    for name in expected.weights.factors:
        torch.testing.assert_close(delta(got, name), delta(expected.weights, name), rtol=1e-5, atol=1e-6)
    assert merged.certificate.bound == pytest.approx(expected.certificate.bound, rel=1e-2, abs=1e-5)
    for index, shard in enumerate(shards):
        own = {ref: weight for ref, weight in MIXTURE.entries if owners_of(ref, len(shards))[0] == index}
        assert shard.reduced
        assert all(dict(entries) == own for entries in shard.reduced)


async def test_a_sketch_over_the_shards_is_nearly_as_near_and_its_bound_holds(many_root):
    """Its way is never the cheapest for layers as small as these."""
    rank, shards = 10, [CountingShard(str(many_root)) for _ in range(3)]

    def by_sketch(sizes, rank):
        return {name: Method.RANDOMIZED for of_shard in sizes for name in of_shard}

    merger = Merger([LocalHandle(shard) for shard in shards], lambda ref: owners_of(ref, 3), by_sketch)
    merged = await merger.merge(Wanted(MIXTURE, rank, "float32"))
    best, exact, got = (
        merged_here(many_root, rank),
        merged_here(many_root, 64).weights,
        unpack(merged.packed, torch.float32),
    )
    error = sum(float((delta(got, n) - delta(exact, n)).square().sum()) for n in exact.factors) ** 0.5
    assert best.certificate.bound * 0.999 < error < best.certificate.bound * 1.02
    assert error * 0.999 < merged.certificate.bound < 2 * error
    assert (merged.certificate.method, merged.certificate.rank) == ("randomized", rank)
    assert not any(shard.reduced for shard in shards)


async def test_those_who_ask_for_the_same_mixture_wait_for_one_merge_which_is_kept(many_root):
    coordinator, shards = coordinator_of(many_root)
    wanted = Wanted(MIXTURE, 16, "float32")
    first = await coordinator.merge(Wanted(MIXTURE, 17, "float32"))
    num_asks = [len(shard.reduced) for shard in shards]
    found = await asyncio.gather(*(coordinator.merge(wanted) for _ in range(4)))
    again = await coordinator.merge(wanted)
    assert all(merged is again for merged in found)
    assert first is not again
    assert [len(shard.reduced) for shard in shards] == [2 * asks for asks in num_asks]


async def test_the_share_of_a_shard_that_dies_is_reduced_by_the_next_copies(many_root):
    shards = [CountingShard(str(many_root)) for _ in range(3)]
    handles = [LocalHandle(shard) for shard in shards]
    handles[1] = DyingShard()
    merged = await Coordinator(handles).merge(Wanted(MIXTURE, 64, "float32"))
    got, expected = unpack(merged.packed, torch.float32), merged_here(many_root, 64).weights
    for name in expected.factors:
        torch.testing.assert_close(delta(got, name), delta(expected, name), rtol=1e-5, atol=1e-6)
    alone = Coordinator(handles, FetchSettings(copies=1))
    error = await alone.merge(Wanted(MIXTURE, 64, "float32"))
    assert isinstance(error, AdapterUnavailable)
    assert "lies on shards 1" in str(error)


class DyingShard(FakeShard):
    """Dies of every call."""

    def options(self, *, method_name, stream, _by_reference, **_):
        return self

    def remote(self, *args):
        return asyncio.ensure_future(self._answer(None, "died", 0.0))


async def test_an_adapter_that_is_missing_fails_the_mixture_and_is_named(many_root):
    coordinator, _ = coordinator_of(many_root)
    beyond = Mixture.of({AdapterRef("nowhere", 3): 1.0, **dict(MIXTURE.entries)})
    error = await coordinator.merge(Wanted(beyond, 64, "float32"))
    assert isinstance(error, UnknownDomain)
    assert "nowhere@3" in str(error)


async def answered(replica, mixture, request_id="r"):
    request = GenerateRequest(request_id, "What is 7 times 6?", mixture, SamplingParams(max_tokens=24))
    async with aclosing(replica.generate(request)) as chunks:
        return [chunk async for chunk in chunks]


def token_ids(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


def answered_by_all(root, mixture):
    """The reference: every adapter in the batch, none merged."""
    engine = Engine(nano_base(root), EngineSettings())
    for ref in mixture.refs:
        engine.add_adapter(ref, loaded(root, ref))
    engine.submit(GenerateRequest("r", "What is 7 times 6?", mixture, SamplingParams(max_tokens=24)))
    chunks = []
    while engine.has_work:
        chunks += [output.chunk for output in engine.step()]
    return token_ids(chunks)


async def test_a_large_mixture_is_answered_as_through_all_of_its_adapters_and_says_how_it_was_merged(many_root):
    coordinator, shards = coordinator_of(many_root)
    replica = BaseReplica(LocalHandle(coordinator), AppSettings(root=str(many_root), threads=1))
    small = Mixture.of(dict(MIXTURE.entries[:MAX_CO_BATCHED]))
    num_reduced = []
    for number in range(2):  # the second finds it in the slot bank
        first, *others = chunks = await answered(replica, MIXTURE, f"large{number}")
        assert token_ids(chunks) == answered_by_all(many_root, MIXTURE)
        assert 48 <= first.merged.rank <= 64
        assert first.merged.kept_energy == pytest.approx(1.0)
        assert 0 < first.merged.bound < 1e-3
        assert all(chunk.merged is None for chunk in others)
        num_reduced.append(sum(len(shard.reduced) for shard in shards))
    (resident,) = replica.engine.resident
    assert (resident.domain[0], resident.version) == ("~", 64)
    with pytest.raises(InvalidInput):
        AdapterRef.parse(str(resident))
    chunks = await answered(replica, small, "small")
    assert token_ids(chunks) == answered_by_all(many_root, small)
    assert chunks[0].merged is None
    assert num_reduced == [sum(len(shard.reduced) for shard in shards)] * 2
    replica.engine.stop()


async def test_the_certificate_reaches_the_client(many_root):
    coordinator, _ = coordinator_of(many_root)
    replica = BaseReplica(LocalHandle(coordinator), AppSettings(root=str(many_root), threads=1, merge_rank=10))
    gateway = Gateway(LocalHandle(WordRouter([])), LocalHandle(replica), str(many_root))
    merged = await coordinator.merge(Wanted(MIXTURE, 10, "float32"))
    assert isinstance(merged, MergedMixture)
    mixture = {str(ref): weight for ref, weight in MIXTURE.entries}
    async with client_of(gateway) as client:
        body = {"prompt": "hi", "mixture": mixture, "max_tokens": 4}
        whole = (await client.post("/v1/completions", json=body)).json()
        small = (await client.post("/v1/completions", json={**body, "mixture": {"d1": 1.0}})).json()
        classified = (
            await client.post("/v1/classify", json={"prompt": "hi", "mixture": mixture, "labels": ["a"]})
        ).json()
    certificate = {name: getattr(merged.certificate, name) for name in ("method", "rank", "bound", "kept_energy")}
    assert whole["zephyra"]["merged"] == classified["zephyra"]["merged"] == certificate
    assert whole["zephyra"]["mixture"] == classified["zephyra"]["mixture"] == mixture
    assert "merged" not in small["zephyra"]
    entries = [pb.MixtureEntry(domain=ref.domain, version=1, weight=weight) for ref, weight in MIXTURE.entries]
    request = pb.GenerateRequest(prompt="hi", mixture=pb.Mixture(entries=entries), sampling=pb.Sampling(max_tokens=4))
    over_grpc = await grpc_api.complete(gateway, request, Context())
    for name, value in certificate.items():
        assert getattr(over_grpc.routing.merged, name) == value
    request.mixture.CopyFrom(pb.Mixture(entries=entries[:1]))
    assert not (await grpc_api.complete(gateway, request, Context())).routing.HasField("merged")
    replica.engine.stop()


async def test_a_mixture_whose_merge_fails_fails_its_request_and_no_other(many_root):
    coordinator = Coordinator([DyingShard(), DyingShard()])
    replica = BaseReplica(LocalHandle(coordinator), AppSettings(root=str(many_root), threads=1))
    large, base = await asyncio.gather(answered(replica, MIXTURE, "large"), answered(replica, Mixture(), "base"))
    assert isinstance(large[-1], AdapterUnavailable)
    assert len(token_ids(base)) == 24
    replica.engine.stop()
