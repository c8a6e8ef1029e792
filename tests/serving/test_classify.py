"""Classification over the whole flow in one process, both wires, against one plain forward pass of merged weights."""

import asyncio
import math

import grpc
import pytest
import torch

from cluster.classification import ClassifyRequest, Normalize
from cluster.config.serving import AppSettings
from cluster.errors import DeadlineExceeded, Overloaded, UnknownDomain, ZephyraError
from cluster.lora.packed_adapter import pack
from cluster.lora.peft_format import unpack
from cluster.lora.weights import adaptable_layers
from cluster.messages import ChatMessage, ClientRequest, GenerateRequest, Mixture, Role, SamplingParams
from cluster.model.base import encode_answer, encode_prompt
from deployments.api import classify
from deployments.api.classify import ClassifyBody
from deployments.api.gateway import Gateway
from deployments.monitoring.metrics import ERRORS, FIRST_TOKEN, MIXTURE_SIZE, REQUESTS, ROUTING, TOKENS
from deployments.monitoring.monitor import UNROUTED, Monitor
from deployments.protos import zephyra_pb2 as pb
from deployments.replica.base_replica import BaseReplica
from tests.monitoring.ledger import Ledger
from tests.nano import CONTEXT_TOKENS, DOMAINS, nano_base
from tests.serving.http_client import HI, client_of, error_of
from tests.serving.local import GoneHandle, LocalHandle, WordRouter
from tests.serving.test_gateway import gateway_to, until
from tests.serving.test_grpc import CHAT, MIXTURE, TURNS, Context

pytestmark = pytest.mark.anyio

LABELS = ["42", "forty-two", "The answer is 42.", "数字", "no", "<|assistant|>"]
PROMPT = "law and math: What is 7 times 6? Answer with a number and nothing else."
LONG_PROMPT = "a b c d " * (CONTEXT_TOKENS // 20)
"""Takes many steps to be read, so that there is time to leave."""


def expected(root, prompt, weights, labels):
    """Log-probability and number of tokens of each label: no engine, no cache, each label a pass of its own."""
    base = nano_base(root)
    for domain, weight in weights.items():
        adapter = unpack(pack(root / "adapters" / domain / "1"), torch.float32)
        for name, layer in adaptable_layers(base.model).items():
            factors = adapter.factors[name]
            layer.weight.data += weight * factors.scale * factors.b_OR @ factors.a_RI
    prompt_ids, found = encode_prompt(base.tokenizer, prompt), []
    for label in labels:
        ids = encode_answer(base.tokenizer, label)
        with torch.no_grad():
            logits_TV = base.model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1].double()
        found.append((float(logits_TV.log_softmax(dim=-1)[range(len(ids)), ids].sum()), len(ids)))
    return found, len(prompt_ids)


@pytest.mark.parametrize("normalize", ["sum", "length"])
async def test_scores_are_those_of_a_plain_forward_pass_over_both_wires(root, system, client, normalize):
    scores, prompt_tokens = expected(root, PROMPT, {"law": 0.5, "math": 0.5}, LABELS)
    body = {"prompt": PROMPT, "labels": LABELS, "normalize": normalize}
    content = (await client.post("/v1/classify", json=body)).json()
    assert (content["object"], content["model"]) == ("classification", "zephyra")
    assert content["usage"] == {"prompt_tokens": prompt_tokens}
    assert content["zephyra"]["mixture"] == {"law@1": 0.5, "math@1": 0.5}
    assert content["zephyra"]["probabilities"] == {"law": 0.5, "math": 0.5, "sql": 0.0, "none": 0.0}
    assert content["zephyra"]["routing_ms"] > 0
    assert content["zephyra"]["request_id"]
    assert [one["label"] for one in content["scores"]] == LABELS
    assert [one["num_tokens"] for one in content["scores"]] == [num_tokens for _, num_tokens in scores]
    assert [one["logprob"] for one in content["scores"]] == pytest.approx([s for s, _ in scores], abs=1e-4)
    compared = [logprob / (num_tokens if normalize == "length" else 1) for logprob, num_tokens in scores]
    shares = torch.tensor(compared, dtype=torch.float64).softmax(dim=0).tolist()
    assert [one["probability"] for one in content["scores"]] == pytest.approx(shares, abs=1e-4)
    assert math.fsum(one["probability"] for one in content["scores"]) == pytest.approx(1.0, abs=1e-12)
    assert content["label"] == LABELS[shares.index(max(shares))]

    request = pb.ClassifyRequest(prompt=PROMPT, labels=LABELS, normalize=f"NORMALIZE_{normalize.upper()}")
    over_grpc = await classify.classify(system.gateway, request, Context())
    assert (over_grpc.label, over_grpc.prompt_tokens) == (content["label"], prompt_tokens)
    for theirs, ours in zip(over_grpc.scores, content["scores"], strict=True):
        assert (theirs.label, theirs.num_tokens) == (ours["label"], ours["num_tokens"])
        # Batched differently perhaps, which in torch changes the last bits.
        assert (theirs.logprob, theirs.probability) == pytest.approx((ours["logprob"], ours["probability"]), abs=1e-4)
    assert [(e.domain, e.version, e.weight) for e in over_grpc.routing.mixture.entries] == [
        ("law", 1, 0.5),
        ("math", 1, 0.5),
    ]
    assert over_grpc.routing.request_id != content["zephyra"]["request_id"]


async def test_who_judges_matters_and_can_be_said_in_every_way(root, client):
    asked = {"messages": [{"role": "user", "content": PROMPT}], "labels": LABELS}
    seen = []
    for selection, weights in (
        ({"model": "base"}, {}),
        ({"model": "zephyra:sql"}, {"sql": 1.0}),
        ({"mixture": {"law": 0.25, "sql@1": 2.0}}, {"law": 0.25, "sql": 2.0}),
    ):
        content = (await client.post("/v1/classify", json={**asked, **selection})).json()
        logprobs = [one["logprob"] for one in content["scores"]]
        scores, _ = expected(root, PROMPT, weights, LABELS)
        assert logprobs == pytest.approx([logprob for logprob, _ in scores], abs=1e-4)
        assert content["zephyra"] == {
            "mixture": {f"{domain}@1": weight for domain, weight in weights.items()},
            "probabilities": None,
            "routing_ms": 0.0,
        }
        seen.append(logprobs)
    assert seen[0] != seen[1] != seen[2]


NORMAL = ClassifyRequest(ClientRequest("hi"), ("a", "b"))
_HI_CHAT = pb.Chat(messages=[pb.Message(role=pb.Message.ROLE_USER, content="hi")])


@pytest.mark.parametrize(
    ("body", "message", "means"),
    [
        ({"prompt": "hi"}, {"prompt": "hi"}, NORMAL),
        (
            {"messages": HI, "model": "base", "normalize": "length", "priority": -3, "timeout_s": 1.5},
            {"chat": _HI_CHAT, "base": pb.Base(), "normalize": "NORMALIZE_LENGTH", "priority": -3, "timeout_s": 1.5},
            ClassifyRequest(
                ClientRequest((ChatMessage(Role.USER, "hi"),), "base", priority=-3, timeout_s=1.5),
                ("a", "b"),
                Normalize.LENGTH,
            ),
        ),
        (
            {"prompt": "hi", "model": "zephyra:law", "normalize": "sum"},
            {"prompt": "hi", "domain": "law", "normalize": "NORMALIZE_SUM"},
            ClassifyRequest(ClientRequest("hi", "zephyra:law"), ("a", "b")),
        ),
        (
            {"prompt": "hi", "mixture": {"law": 0.5, "math@2": 1.0}},
            {"prompt": "hi", "mixture": MIXTURE},
            ClassifyRequest(ClientRequest("hi", mixture={"law": 0.5, "math@2": 1.0}), ("a", "b")),
        ),
        (
            {"prompt": "hi", "mixture": None, "messages": None, "normalize": None, "priority": None, "timeout_s": None},
            {"prompt": "hi", "router": pb.Router()},
            NORMAL,
        ),
    ],
)
def test_requests_mean_the_same_over_both_wires(body, message, means):
    labels = ["a", "b"]
    assert ClassifyBody.model_validate({**body, "labels": labels}).classify_request() == means
    sent = pb.ClassifyRequest(**message, labels=labels).SerializeToString()
    assert classify.classify_request(pb.ClassifyRequest.FromString(sent)) == means


def test_a_chat_over_grpc_keeps_all_its_turns():
    assert classify.classify_request(pb.ClassifyRequest(chat=CHAT, labels=["a"])).asked.prompt == TURNS


@pytest.mark.parametrize(
    ("body", "message", "words"),
    [
        ({"labels": []}, {"labels": []}, "0 labels; expected 1 to 64"),
        ({"labels": ["a", "a"]}, {"labels": ["a", "a"]}, "'a' is given twice"),
        ({"labels": [""]}, {"labels": [""]}, "empty"),
        ({"labels": ["x" * 257]}, {"labels": ["x" * 257]}, "257 characters"),
        ({"labels": ["a"], "prompt": " "}, {"labels": ["a"], "prompt": " "}, "The prompt is empty"),
        ({"labels": ["a"], "timeout_s": 0}, {"labels": ["a"], "timeout_s": 0}, "timeout_s"),
        (
            {"labels": ["a"], "mixture": {"law": -1}},
            {"labels": ["a"], "mixture": pb.Mixture(entries=[pb.MixtureEntry(domain="law", weight=-1)])},
            "negative",
        ),
        (
            {"labels": ["ab " * 85], "prompt": "a b " * (CONTEXT_TOKENS // 4 - 5)},
            {"labels": ["ab " * 85], "prompt": "a b " * (CONTEXT_TOKENS // 4 - 5)},
            f"context of {CONTEXT_TOKENS}",
        ),
        ({"labels": ["a"], "normalize": "mean"}, {"labels": ["a"], "normalize": 7}, "normalize"),
        ({}, {}, "labels"),
    ],
)
async def test_bad_requests_get_a_sentence_over_both_wires(system, client, body, message, words):
    response = await client.post("/v1/classify", json={"prompt": "hi", "model": "base", **body})
    assert response.status_code == 400, response.text
    assert words in error_of(response)["message"]
    context = Context()
    selection = {} if "mixture" in message else {"base": pb.Base()}
    with pytest.raises(ZephyraError):
        await classify.classify(system.gateway, pb.ClassifyRequest(**{"prompt": "hi", **selection, **message}), context)
    assert context.code == grpc.StatusCode.INVALID_ARGUMENT
    assert words in context.details


async def test_it_takes_a_prompt_or_messages(client):
    for body in ({"labels": ["a"]}, {"labels": ["a"], "prompt": "hi", "messages": HI}):
        response = await client.post("/v1/classify", json=body)
        assert (response.status_code, error_of(response)["code"]) == (400, "invalid_input")


def classifying(prompt=PROMPT, labels=LABELS, model="base", **asked):
    return ClassifyRequest(ClientRequest(prompt, model, **asked), tuple(labels))


async def test_the_prompt_is_read_once_for_all_labels(root, system):
    await system.gateway.classify(classifying())
    stats = await system.replica.stats()
    assert (stats.num_finished, stats.num_generated_tokens) == (len(LABELS), 0)
    tokenizer = nano_base(root).tokenizer
    num_prompt = len(encode_prompt(tokenizer, PROMPT))
    # Whole blocks of 16, without the last token, which gives the logits of a label's first.
    reusable = (num_prompt - 1) // 16 * 16
    assert stats.num_reused_tokens == reusable * (len(LABELS) - 1) > 0
    num_read = sum(num_prompt + len(encode_answer(tokenizer, label)) - 1 for label in LABELS)
    assert stats.num_prompt_tokens == num_read - stats.num_reused_tokens


async def test_what_is_generated_beside_changes_nothing_and_is_not_changed(system):
    requests = [
        GenerateRequest(f"r{index}", f"Tell me of {index}.", Mixture(), SamplingParams(max_tokens=40))
        for index in range(3)
    ]

    async def generated(request):
        return [token async for chunk in system.replica.generate(request) for token in chunk.token_ids]

    alone = [await generated(request) for request in requests]
    scores_alone = (await system.gateway.classify(classifying())).scores
    *beside, found = await asyncio.gather(*map(generated, requests), system.gateway.classify(classifying()))
    assert beside == alone
    for one, other in zip(found.scores, scores_alone, strict=True):
        # Equal to the last bit on the native kernels; in torch up to rounding.
        assert (one.label, one.logprob) == (other.label, pytest.approx(other.logprob, abs=1e-4))


async def is_idle(replica):
    stats = await replica.stats()
    return stats.num_running + stats.num_waiting == 0


def is_read(stats):
    """The first label is, or was: on a quick machine it may have been between two looks."""
    return stats.num_running == 1 or stats.num_finished > 0


@pytest.mark.parametrize("is_there", [is_read, lambda stats: stats.num_finished > 0])
async def test_a_caller_that_leaves_takes_all_its_labels_along(system, is_there):
    """Whether it leaves while the first is read, or while the others are."""
    labels = [f"label {index}" for index in range(64)]
    task = asyncio.ensure_future(system.gateway.classify(classifying(LONG_PROMPT, labels)))
    await until(lambda: _is(system.replica, is_there), pause_s=0)
    task.cancel()
    await until(lambda: is_idle(system.replica))
    assert (await system.replica.stats()).num_finished < len(labels)
    assert system.replica.engine.num_unanswered == 0


async def _is(replica, is_there):
    return is_there(await replica.stats())


async def test_a_caller_that_leaves_before_the_adapters_came_is_forgotten(root):
    replica = BaseReplica(GoneHandle(), AppSettings(root=str(root), threads=1))
    gateway = Gateway(LocalHandle(WordRouter(DOMAINS)), LocalHandle(replica), str(root))
    task = asyncio.ensure_future(gateway.classify(classifying(model="zephyra:law")))
    await until(lambda: _is(replica, lambda stats: stats.num_waiting == 1))
    task.cancel()
    await until(lambda: is_idle(replica))
    replica.engine.stop()


async def test_a_deadline_ends_all_labels(system, client):
    given = classifying(2 * LONG_PROMPT, [f"label {index}" for index in range(64)], timeout_s=0.02)
    with pytest.raises(DeadlineExceeded):
        await system.gateway.classify(given)
    await until(lambda: is_idle(system.replica))
    body = {"prompt": "e " + 2 * LONG_PROMPT, "labels": ["a", "b"], "timeout_s": 0.02, "model": "base"}
    response = await client.post("/v1/classify", json=body)
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
    request = pb.ClassifyRequest(prompt="f " + 2 * LONG_PROMPT, base=pb.Base(), labels=["a"], timeout_s=0.02)
    context = Context()
    with pytest.raises(DeadlineExceeded):
        await classify.classify(system.gateway, request, context)
    assert context.code == grpc.StatusCode.DEADLINE_EXCEEDED


class FullReplica:
    """Has no place left."""

    def __init__(self):
        self.asked = []

    async def score(self, request):
        self.asked.append(request)
        yield Overloaded("256 requests are waiting, which is the most; try again in a moment.")


async def test_the_replica_is_asked_once_and_what_it_says_is_wrong_reaches_the_client(root):
    replica = FullReplica()
    async with client_of(gateway_to(root, replica)) as client:
        body = {"prompt": "of law", "labels": ["a", "b"], "priority": 3, "timeout_s": 5.0}
        response = await client.post("/v1/classify", json=body)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert error_of(response)["code"] == "overloaded"
    (asked,) = replica.asked
    assert (asked.prompt, asked.answers, asked.priority) == ("of law", ("a", "b"), 3)
    assert [str(ref) for ref in asked.mixture.refs] == ["law@1"]
    assert 4.0 < asked.timeout_s <= 5.0


async def test_one_request_leaves_most_of_the_queue_to_others(root):
    settings = AppSettings(root=str(root), threads=1, engine={"max_batch_size": 2, "max_waiting": 4})
    replica = BaseReplica(GoneHandle(), settings)
    gateway = gateway_to(root, replica)
    labels = [f"label {index}" for index in range(32)]
    found = await gateway.classify(classifying(labels=labels))
    assert [one.label for one in found.scores] == labels
    assert math.fsum(one.probability for one in found.scores) == pytest.approx(1.0)
    replica.engine.stop()


async def test_requests_and_errors_are_counted_and_no_tokens(system):
    gateway, ledger = system.gateway, Ledger()
    gateway.monitor = Monitor(ledger)
    await gateway.classify(classifying("law and math", model="zephyra"))
    assert (ledger.sum(REQUESTS, "law"), ledger.sum(MIXTURE_SIZE, "law"), ledger.count(ROUTING)) == (1, 2, 1)
    assert ledger.count(TOKENS, "law") == ledger.count(FIRST_TOKEN, "law") == 0
    with pytest.raises(UnknownDomain):
        await gateway.classify(classifying(model="zephyra:art"))
    assert ledger.sum(ERRORS, UNROUTED, "UnknownDomain") == 1


async def test_weights_beyond_all_measure_are_the_clients_error(client):
    body = {"prompt": "hi", "labels": ["a", "b"], "mixture": {"law": 1e38}}
    response = await client.post("/v1/classify", json=body)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_mixture")
    assert "smaller weights" in error_of(response)["message"]
