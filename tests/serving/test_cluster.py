"""The whole of Zephyra on a real Ray cluster: both wires, live publishing, clients that leave, processes that die."""

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import httpx
import pytest
import ray
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from ray import serve
from ray.util import list_named_actors

from cluster.config.serving import AppSettings, EngineSettings
from cluster.engine.engine import Engine
from cluster.lora.catalog import Catalog
from cluster.lora.packed_adapter import pack
from cluster.lora.peft_format import unpack
from cluster.lora.placement import shard_of
from cluster.messages import (
    MAX_CO_BATCHED,
    MAX_PROMPT_CHARACTERS,
    AdapterRef,
    GenerateRequest,
    Mixture,
    SamplingParams,
)
from deployments.application import APPLICATION_NAME
from deployments.protos import zephyra_pb2 as pb
from deployments.protos.zephyra_pb2_grpc import ZephyraStub
from deployments.shards.adapter_shard import TooLarge
from tests.nano import CONTEXT_TOKENS, nano_base, publish_adapter, publish_router
from tests.serving.bad_input import BAD_REQUESTS, check_sentence

pytestmark = pytest.mark.ray

LAW, MATH = AdapterRef("law", 1), AdapterRef("math", 1)
NUM_SHARDS = 2
LONG = CONTEXT_TOKENS - 100
"""Tokens that take seconds to make, so that there is time to leave."""


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served.http, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def stub(served):
    with grpc.insecure_channel(served.grpc) as channel:
        yield ZephyraStub(channel)


def stats_of_each():
    handle = serve.get_deployment_handle("BaseReplica", APPLICATION_NAME)
    return handle.broadcast("stats").results(timeout_s=30)


def stats():
    """Of all replicas together."""
    counts = [vars_of(one) for one in stats_of_each()]
    return SimpleNamespace(**{name: sum(one[name] for one in counts) for name in counts[0]})


def vars_of(stats):
    return {name: value for name, value in dataclasses.asdict(stats).items() if isinstance(value, int)}


def until(condition, seconds):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not come to be"
        time.sleep(0.05)


def in_process(root, mixture, **sampling):
    """Token ids and text of an engine of this process: the reference."""
    base = nano_base(root)
    engine = Engine(base, EngineSettings())
    for ref in mixture.refs:
        packed = pack(root / "adapters" / ref.domain / str(ref.version))
        engine.add_adapter(ref, unpack(packed, base.model.dtype))
    engine.submit(GenerateRequest("r", "What is 7 times 6?", mixture, SamplingParams(**sampling)))
    chunks = []
    while engine.has_work:
        chunks += [output.chunk for output in engine.step()]
    return [token for chunk in chunks for token in chunk.token_ids], "".join(chunk.text for chunk in chunks)


def kill(deployment):
    """As if the machines of all its replicas had lost power."""
    prefix = f"SERVE_REPLICA::{APPLICATION_NAME}#{deployment}#"
    names = [a["name"] for a in list_named_actors(all_namespaces=True) if a["name"].startswith(prefix)]
    assert names
    for name in names:
        ray.kill(ray.get_actor(name, namespace="serve"))


@pytest.mark.parametrize(
    ("http", "selection", "mixture"),
    [
        ({"model": "base"}, {"base": pb.Base()}, Mixture()),
        ({"model": "zephyra:law"}, {"domain": "law"}, Mixture.of({LAW: 1.0})),
        (
            {"mixture": {"law": 0.25, "math@1": 0.5}},
            {
                "mixture": pb.Mixture(
                    entries=[
                        pb.MixtureEntry(domain="law", weight=0.25),
                        pb.MixtureEntry(domain="math", version=1, weight=0.5),
                    ]
                )
            },
            Mixture.of({LAW: 0.25, MATH: 0.5}),
        ),
    ],
)
@pytest.mark.parametrize("sampling", [{"max_tokens": 24}, {"max_tokens": 24, "temperature": 0.9, "seed": 11}])
def test_http_grpc_and_an_engine_of_this_process_give_the_same_tokens(
    served, client, stub, http, selection, mixture, sampling
):
    token_ids, text = in_process(served.root, mixture, **sampling)
    body = {"prompt": "What is 7 times 6?", **http, **sampling}
    over_http = client.post("/v1/completions", json=body).json()
    assert over_http["choices"][0]["text"] == text
    assert over_http["usage"]["completion_tokens"] == len(token_ids)
    assert over_http["zephyra"]["mixture"] == {str(ref): weight for ref, weight in mixture.entries}
    request = pb.GenerateRequest(prompt="What is 7 times 6?", sampling=pb.Sampling(**sampling), **selection)
    whole = stub.Complete(request)
    assert [(list(choice.token_ids), choice.text) for choice in whole.choices] == [(token_ids, text)]
    chunks = list(stub.Generate(request))
    assert [token for chunk in chunks for token in chunk.token_ids] == token_ids
    assert chunks[-1].usage == whole.usage
    assert whole.routing.mixture == chunks[0].routing.mixture
    assert [(e.domain, e.version, e.weight) for e in whole.routing.mixture.entries] == [
        (ref.domain, ref.version, weight) for ref, weight in mixture.entries
    ]


def test_labels_are_scored_alike_over_both_wires(client, stub):
    labels = ["42", "forty-two", "no"]
    body = {"prompt": "What is 7 times 6?", "model": "zephyra:law", "labels": labels}
    over_http = client.post("/v1/classify", json=body).json()
    over_grpc = stub.Classify(pb.ClassifyRequest(prompt="What is 7 times 6?", domain="law", labels=labels))
    assert over_http["label"] == over_grpc.label
    assert over_http["zephyra"]["mixture"] == {"law@1": 1.0}
    for ours, theirs in zip(over_http["scores"], over_grpc.scores, strict=True):
        assert (ours["label"], ours["num_tokens"]) == (theirs.label, theirs.num_tokens)
        assert ours["logprob"] == pytest.approx(theirs.logprob, abs=1e-4)
    refused = client.post("/v1/classify", json={**body, "labels": ["a", "a"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_input")


def test_events_come_while_the_answer_is_being_made(client):
    body = {"messages": [{"role": "user", "content": "hi"}], "model": "base", "max_tokens": 300, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = []
        for line in response.iter_lines():
            lines.append((time.monotonic(), line))
    events = [(at_s, line.removeprefix("data: ")) for at_s, line in lines if line]
    assert events[-1][1] == "[DONE]"
    assert json.loads(events[-2][1])["choices"][0]["finish_reason"] == "length"
    assert events[-1][0] - events[0][0] > 0.05
    assert len(events) > 10


def test_a_request_id_comes_back_once_and_the_same(client):
    given = client.get("/health", headers={"x-request-id": "r-17"})
    assert given.headers.get_list("x-request-id") == ["r-17"]
    made = client.get("/health")
    assert len(made.headers.get_list("x-request-id")) == 1


def test_models_route_and_health_over_both_wires(client, stub):
    models = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert models[:3] == ["base", "zephyra", "zephyra:law"]
    assert client.get("/health").json()["status"] == "ok"
    routed = client.post("/v1/route", json={"prompt": "hi"}).json()
    # No router is published here: every prompt is the base's.
    assert (routed["mixture"], routed["probabilities"]) == ({}, {"none": 1.0})
    over_grpc = stub.Route(pb.RouteRequest(prompt="hi"))
    assert (list(over_grpc.mixture.entries), dict(over_grpc.probabilities)) == ([], {"none": 1.0})


def test_reflection_names_the_service(served):
    with grpc.insecure_channel(served.grpc) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert "zephyra.v1.Zephyra" in services


@pytest.mark.parametrize("case", BAD_REQUESTS, ids=lambda case: case.name)
def test_bad_requests_over_both_wires(client, stub, case):
    headers = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=json.dumps(case.http_body), headers=headers)
    assert response.status_code == case.http_status
    check_sentence(response.json()["error"]["message"], case)
    for call in (stub.Complete, lambda request: list(stub.Generate(request))):
        with pytest.raises(grpc.RpcError) as caught:
            call(case.grpc_request)
        assert caught.value.code() == case.grpc_code
        check_sentence(caught.value.details(), case)


def test_bytes_that_are_no_text_over_both_wires(served, client):
    headers = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=b'{"prompt": "\xff"}', headers=headers)
    assert response.status_code == 400
    assert "UTF-8" in response.json()["error"]["message"]
    # The field `prompt` with one byte that is no UTF-8, as no protobuf library would write it.
    with grpc.insecure_channel(served.grpc) as channel:
        complete = channel.unary_unary("/zephyra.v1.Zephyra/Complete")
        with pytest.raises(grpc.RpcError) as caught:
            complete(b"\x0a\x01\xff", timeout=10)
    assert "Traceback" not in caught.value.details()


def test_the_longest_prompt_reaches_the_engine_over_both_wires(client, stub):
    """Four megabytes: within the limit of the body, and of a message between deployments."""
    prompt = "😀" * MAX_PROMPT_CHARACTERS
    body = json.dumps({"prompt": prompt}, ensure_ascii=False).encode()
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    with pytest.raises(grpc.RpcError) as caught:
        stub.Complete(pb.GenerateRequest(prompt=prompt))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_client_that_leaves_frees_its_place_on_either_wire(client, stub):
    before = stats()
    body = {"prompt": "hi", "model": "base", "max_tokens": LONG, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    # Before the first chunk: Ray's proxy forgets to cancel when the client leaves just as it passes a chunk on.
    prompt = "a b c d e " * ((CONTEXT_TOKENS - 200) // 10)
    call = stub.Generate(pb.GenerateRequest(prompt=prompt, base=pb.Base(), sampling=pb.Sampling(max_tokens=100)))
    until(lambda: stats().num_prompt_tokens > before.num_prompt_tokens + 1000, seconds=5)
    call.cancel()
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={**body, "stream": False}, timeout=0.5)
    with pytest.raises(grpc.RpcError):
        stub.Complete(
            pb.GenerateRequest(prompt="hi", base=pb.Base(), sampling=pb.Sampling(max_tokens=LONG)), timeout=0.5
        )
    until(lambda: stats().num_running == 0, seconds=2)
    after = stats()
    assert after.num_finished == before.num_finished
    assert before.num_generated_tokens < after.num_generated_tokens < before.num_generated_tokens + 4 * LONG


def test_a_new_version_is_served_within_a_second_and_requests_in_flight_keep_theirs(served, client, stub):
    request = pb.GenerateRequest(prompt="hi", domain="sql", sampling=pb.Sampling(max_tokens=600))
    before = list(stub.Complete(request).choices[0].token_ids)
    in_flight = stub.Generate(request)
    chunks = [next(in_flight)]
    new = publish_adapter(served.root, "sql", seed=77)
    body = {"prompt": "hi", "model": "zephyra:sql", "max_tokens": 1}

    def is_new():
        return client.post("/v1/completions", json=body).json()["zephyra"]["mixture"] == {str(new): 1.0}

    until(is_new, seconds=1)
    chunks += in_flight
    assert [token for chunk in chunks for token in chunk.token_ids] == before
    assert chunks[0].routing.mixture.entries[0].version == new.version - 1
    assert list(stub.Complete(request).choices[0].token_ids) != before


def test_a_published_router_decides_within_a_second(served, client, stub):
    ada = publish_router(served.root)
    prompt = "is this contract valid"
    (decision,) = ada.route([prompt])
    assert decision.weights
    until(lambda: client.post("/v1/route", json={"prompt": prompt}).json()["mixture"], seconds=1)
    whole = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 8}).json()
    own = {"prompt": prompt, "max_tokens": 8, "mixture": decision.weights}
    assert whole["choices"] == client.post("/v1/completions", json=own).json()["choices"]
    adapters = Catalog(served.root).load().adapters
    assert whole["zephyra"]["mixture"] == {f"{name}@{adapters[name]}": w for name, w in decision.weights.items()}
    assert whole["zephyra"]["probabilities"] == pytest.approx(decision.probabilities, abs=1e-5)
    over_grpc = stub.Complete(pb.GenerateRequest(prompt=prompt, sampling=pb.Sampling(max_tokens=8)))
    assert over_grpc.choices[0].text == whole["choices"][0]["text"]
    assert dict(over_grpc.routing.probabilities) == pytest.approx(decision.probabilities, abs=1e-5)


def test_requests_go_where_their_adapters_are_and_a_hot_domain_spreads(served, client):
    """Two replicas: each domain comes to lie on one of them; one in demand comes to lie on both."""
    domains = [f"affine{index}" for index in range(6)]
    for seed, domain in enumerate(domains):
        publish_adapter(served.root, domain, seed)
    until(lambda: client.get("/health").json()["generation"] == Catalog(served.root).latest(), seconds=5)

    def holders(domain):
        return [one for one in stats_of_each() if AdapterRef(domain, 1) in one.resident_adapters]

    def ask(domain, max_tokens=2):
        body = {"prompt": "hi", "model": f"zephyra:{domain}", "max_tokens": max_tokens}
        assert client.post("/v1/completions", json=body).status_code == 200

    for _ in range(4):
        for domain in domains:
            ask(domain)
    assert [len(holders(domain)) for domain in domains] == [1] * len(domains)
    several = {"prompt": "hi", "model": "zephyra:affine0", "max_tokens": 2, "n": 8}
    assert client.post("/v1/completions", json=several).status_code == 200
    assert len(holders("affine0")) == 1
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda _: ask("affine0", max_tokens=200), range(24)))
    assert len(holders("affine0")) == 2


@pytest.mark.parametrize("most_bytes", [2**20, None])
def test_an_adapter_comes_from_the_shards_bit_for_bit_in_a_message_and_by_reference(served, most_bytes):
    handle = serve.get_deployment_handle("Coordinator", APPLICATION_NAME)
    fetch = handle.options(method_name="fetch", stream=True, _by_reference=most_bytes is None)
    fetched = {one.ref: one.result for one in fetch.remote((LAW, MATH), most_bytes)}
    assert fetched.keys() == {LAW, MATH}
    for ref, packed in fetched.items():
        folder = served.root / "adapters" / ref.domain / str(ref.version)
        assert packed.tensors.tobytes() == (folder / "adapter_model.safetensors").read_bytes()
        assert not packed.tensors.flags.writeable
    (named,) = [one.result for one in fetch.remote((LAW,), 100)]
    assert named == TooLarge(fetched[LAW].num_bytes)


def test_a_large_mixture_is_merged_by_the_shards_answers_like_all_its_adapters_and_says_how(served, client):
    refs = [publish_adapter(served.root, f"many{seed}", 200 + seed) for seed in range(MAX_CO_BATCHED + 1)]
    mixture = Mixture.of({ref: 0.1 + index / 64 for index, ref in enumerate(refs)})
    token_ids, text = in_process(served.root, mixture, max_tokens=24)
    body = {"prompt": "What is 7 times 6?", "max_tokens": 24, "mixture": {str(r): w for r, w in mixture.entries}}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["completion_tokens"] == len(token_ids)
    assert answer["zephyra"]["mixture"] == body["mixture"]
    merged = answer["zephyra"]["merged"]
    assert merged["rank"] <= AppSettings().merge_rank
    assert 0 < merged["bound"] < 1e-3
    assert merged["kept_energy"] == pytest.approx(1.0)


def test_a_killed_shard_is_a_clear_503_and_comes_back(served, client, stub):
    new = publish_adapter(served.root, "math", seed=78)
    until(lambda: client.get("/health").json()["generation"] == Catalog(served.root).latest(), seconds=5)
    body = {"prompt": "hi", "model": "zephyra:math", "max_tokens": 4}
    request = pb.GenerateRequest(prompt="hi", domain="math", sampling=pb.Sampling(max_tokens=4))
    kill(f"AdapterShard-{shard_of(new, NUM_SHARDS)}")
    start_s = time.monotonic()
    # Both at the same moment: the shard may be there again for whoever asks later.
    with ThreadPoolExecutor(1) as pool:
        over_grpc = pool.submit(stub.Complete, request, timeout=10)
        response = client.post("/v1/completions", json=body)
    assert time.monotonic() - start_s < 3
    assert response.status_code == 503
    message = response.json()["error"]["message"]
    assert str(new) in message
    assert "try again" in message
    with pytest.raises(grpc.RpcError) as caught:
        over_grpc.result()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    resident = {"prompt": "hi", "model": "zephyra:law", "max_tokens": 4}
    assert client.post("/v1/completions", json=resident).status_code == 200
    until(lambda: client.post("/v1/completions", json=body).status_code == 200, seconds=20)


def test_a_killed_replica_is_told_to_its_clients_and_comes_back(client, stub):
    body = {"prompt": "hi", "model": "base", "max_tokens": LONG, "stream": True}
    call = stub.Generate(pb.GenerateRequest(prompt="hi", base=pb.Base(), sampling=pb.Sampling(max_tokens=LONG)))
    next(call)
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        kill("BaseReplica")
        *_, last = [line for line in lines if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("replica_lost", "server_error")
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "send the request again" in caught.value.details()
    short = {"prompt": "hi", "model": "zephyra:law", "max_tokens": 4}
    until(lambda: client.post("/v1/completions", json=short, timeout=30).status_code == 200, seconds=30)
