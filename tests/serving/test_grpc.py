"""The gRPC wire over the whole flow in one process: translation, errors, and whose peer is local."""

import asyncio
from contextlib import aclosing

import grpc
import pytest

from cluster.errors import ZephyraError
from cluster.messages import ChatMessage, ClientRequest, Role, SamplingParams
from deployments.api import grpc_api
from deployments.api.loopback import is_local_peer
from deployments.protos import zephyra_pb2 as pb
from tests.serving.bad_input import BAD_REQUESTS, check_sentence
from tests.serving.http_client import client_of

pytestmark = pytest.mark.anyio


class Context:
    """The part of Serve's gRPC context that is used."""

    def __init__(self, peer="ipv4:127.0.0.1:5000", metadata=(), auth_context=None):
        self._peer, self.code, self.details = peer, None, ""
        self._metadata, self._auth_context = list(metadata), auth_context or {}

    def invocation_metadata(self):
        return self._metadata

    def auth_context(self):
        return self._auth_context

    def peer(self):
        return self._peer

    def request_id(self):
        return "r-17"

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details


CHAT = pb.Chat(
    messages=[
        pb.Message(role=pb.Message.ROLE_SYSTEM, content="Be brief."),
        pb.Message(role=pb.Message.ROLE_USER, content="hi"),
    ]
)
TURNS = (ChatMessage(Role.SYSTEM, "Be brief."), ChatMessage(Role.USER, "hi"))
MIXTURE = pb.Mixture(
    entries=[pb.MixtureEntry(domain="law", weight=0.5), pb.MixtureEntry(domain="math", version=2, weight=1)]
)
SAMPLING = pb.Sampling(
    max_tokens=3,
    temperature=0.5,
    top_p=0.9,
    top_k=4,
    seed=5,
    stop=["x"],
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    logit_bias={9: -1.5, 2: 3.0},
    stop_token_ids=[7, 8],
    ignore_eos=True,
    logprobs=0,
)
PARAMS = SamplingParams(
    max_tokens=3,
    temperature=0.5,
    top_p=0.9,
    top_k=4,
    seed=5,
    stop=("x",),
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    logit_bias=((2, 3.0), (9, -1.5)),
    stop_token_ids=(7, 8),
    ignore_eos=True,
    logprobs=0,
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (pb.GenerateRequest(prompt="hi"), ClientRequest("hi")),
        (pb.GenerateRequest(prompt="hi", router=pb.Router()), ClientRequest("hi")),
        (pb.GenerateRequest(prompt="hi", base=pb.Base()), ClientRequest("hi", "base")),
        (pb.GenerateRequest(prompt="hi", domain="law"), ClientRequest("hi", "zephyra:law")),
        (pb.GenerateRequest(prompt="hi", mixture=MIXTURE), ClientRequest("hi", mixture={"law": 0.5, "math@2": 1.0})),
        (pb.GenerateRequest(prompt="hi", mixture=pb.Mixture()), ClientRequest("hi", mixture={})),
        (pb.GenerateRequest(chat=CHAT), ClientRequest(TURNS)),
        (pb.GenerateRequest(prompt="hi", sampling=SAMPLING), ClientRequest("hi", sampling=PARAMS)),
        (
            pb.GenerateRequest(prompt="hi", n=3, priority=-2, timeout_s=1.5),
            ClientRequest("hi", num_choices=3, priority=-2, timeout_s=1.5),
        ),
    ],
)
def test_requests_mean_what_they_say(given, expected):
    assert grpc_api.client_request(pb.GenerateRequest.FromString(given.SerializeToString())) == expected


async def generated(gateway, request, context):
    return [chunk async for chunk in grpc_api.generate(gateway, request, context)]


async def test_a_stream_says_the_same_as_the_whole_answer(system):
    request = pb.GenerateRequest(prompt="law and sql", sampling=pb.Sampling(max_tokens=20))
    whole = await grpc_api.complete(system.gateway, request, Context())
    (choice,) = whole.choices
    chunks = await generated(system.gateway, request, Context())
    assert [token for chunk in chunks for token in chunk.token_ids] == list(choice.token_ids)
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert chunks[-1].finish_reason == choice.finish_reason == pb.FINISH_REASON_LENGTH
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 20
    assert chunks[0].routing.mixture == whole.routing.mixture
    assert [(e.domain, e.version, e.weight) for e in whole.routing.mixture.entries] == [
        ("law", 1, 0.5),
        ("sql", 1, 0.5),
    ]
    assert dict(whole.routing.probabilities) == {"law": 0.5, "math": 0.0, "sql": 0.5, "none": 0.0}
    assert not any(chunk.HasField("routing") for chunk in chunks[1:])


async def test_choices_and_logprobs_are_those_of_the_stream_and_of_http(system):
    sampling = pb.Sampling(max_tokens=10, temperature=1.5, seed=4, logprobs=2)
    request = pb.GenerateRequest(prompt="hi", base=pb.Base(), sampling=sampling, n=3)
    whole = await grpc_api.complete(system.gateway, request, Context())
    chunks = await generated(system.gateway, request, Context())
    assert len(whole.choices) == 3
    for index, choice in enumerate(whole.choices):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert [token for chunk in own for token in chunk.token_ids] == list(choice.token_ids)
        assert "".join(chunk.text for chunk in own) == choice.text
        # The two may have been batched differently, which changes a logit's last bits.
        streamed = [logprob.logprob for chunk in own for logprob in chunk.logprobs]
        assert streamed == pytest.approx([logprob.logprob for logprob in choice.logprobs], abs=1e-4)
        assert [chunk.finish_reason > 0 for chunk in own] == [False] * (len(own) - 1) + [True]
        assert [logprob.token_id for logprob in choice.logprobs] == list(choice.token_ids)
        assert all(len(logprob.top) == 2 for logprob in choice.logprobs)
        joined = b"".join(logprob.text_bytes for logprob in choice.logprobs)
        assert joined.decode(errors="replace") == choice.text
    assert whole.usage.completion_tokens == 30
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage == whole.usage
    body = {"prompt": "hi", "model": "base", "max_tokens": 10, "temperature": 1.5, "seed": 4, "logprobs": 2, "n": 3}
    async with client_of(system.gateway) as client:
        over_http = (await client.post("/v1/completions", json=body)).json()
    assert [choice["text"] for choice in over_http["choices"]] == [choice.text for choice in whole.choices]
    for ours, choice in zip(over_http["choices"], whole.choices, strict=True):
        logprobs = [logprob.logprob for logprob in choice.logprobs]
        assert ours["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)


async def test_a_client_that_leaves_frees_its_place(system):
    request = pb.GenerateRequest(prompt="hi", base=pb.Base(), sampling=pb.Sampling(max_tokens=3000))
    async with aclosing(grpc_api.generate(system.gateway, request, Context())) as chunks:
        await anext(chunks)
        assert (await system.replica.stats()).num_running == 1
    await asyncio.sleep(0.1)
    stats = await system.replica.stats()
    assert (stats.num_running, stats.num_finished) == (0, 0)


async def test_route(system):
    routing = await grpc_api.route(system.gateway, pb.RouteRequest(prompt="of math"), Context())
    assert [(e.domain, e.weight) for e in routing.mixture.entries] == [("math", 1.0)]
    assert routing.routing_ms > 0


@pytest.mark.parametrize("case", BAD_REQUESTS, ids=lambda case: case.name)
async def test_bad_requests_get_a_code_and_a_sentence(system, case):
    for call in (grpc_api.complete, generated):
        context = Context()
        with pytest.raises(ZephyraError):
            await call(system.gateway, case.grpc_request, context)
        assert context.code == case.grpc_code
        check_sentence(context.details, case)


async def test_a_role_must_be_given(system):
    context = Context()
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(content="hi")]))
    with pytest.raises(ZephyraError):
        await grpc_api.complete(system.gateway, request, context)
    assert (context.code, "role" in context.details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_a_bug_is_not_shown():
    context = Context()
    with pytest.raises(AttributeError):
        await grpc_api.complete(None, pb.GenerateRequest(prompt="hi"), context)
    assert context.code == grpc.StatusCode.INTERNAL
    assert context.details == "Internal error in request r-17; it has been logged."


@pytest.mark.parametrize(
    "peer",
    ["ipv4:127.0.0.1:5000", "ipv4:127.8.9.1:1", "ipv6:%5B::1%5D:5000", "ipv6:[::1]:5000", "unix:", "unix:/run/socket"],
)
def test_who_is_on_this_machine(peer):
    assert is_local_peer(peer)


@pytest.mark.parametrize(
    "peer",
    [
        "ipv4:192.168.0.7:5000",
        "ipv4:10.0.0.1:127",
        "ipv4:1.127.0.0:5000",
        "ipv6:%5Bfe80::1%5D:5000",
        "ipv6:%5B::11%5D:5000",
        "",
        "unknown",
        "ipv4:",
    ],
)
def test_who_is_elsewhere(peer):
    assert not is_local_peer(peer)
