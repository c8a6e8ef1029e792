"""The HTTP wire over the whole flow in one process: OpenAI's shapes, and what bad bodies get."""

import json
import logging

import pytest

from cluster.errors import DeadlineExceeded, Overloaded
from cluster.messages import GenerateRequest, Mixture, SamplingParams
from deployments.api.body_limit import MAX_BODY_BYTES
from deployments.api.gateway import Gateway
from deployments.api.openai_messages import CompletionBody
from tests.nano import DOMAINS
from tests.serving.bad_input import BAD_REQUESTS, check_sentence
from tests.serving.http_client import HI, client_of, error_of, events
from tests.serving.local import GoneHandle, LocalHandle, WordRouter

pytestmark = pytest.mark.anyio


LONG_REQUEST = GenerateRequest("r", "hi", Mixture(), SamplingParams(max_tokens=40))


async def test_a_completion(client):
    body = {"model": "zephyra", "prompt": "law and math", "max_tokens": 6}
    content = (await client.post("/v1/completions", json=body)).json()
    assert (content["object"], content["model"]) == ("text_completion", "zephyra")
    assert content["id"].startswith("cmpl-")
    assert content["choices"][0]["finish_reason"] == "length"
    usage = content["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    zephyra = content["zephyra"]
    assert zephyra["mixture"] == {"law@1": 0.5, "math@1": 0.5}
    assert zephyra["probabilities"] == {"law": 0.5, "math": 0.5, "sql": 0.0, "none": 0.0}
    assert zephyra["routing_ms"] > 0


async def test_a_chat(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "law"}]
    body = {"model": "base", "messages": messages, "max_completion_tokens": 5}
    content = (await client.post("/v1/chat/completions", json=body)).json()
    assert content["object"] == "chat.completion"
    assert content["choices"][0]["message"]["role"] == "assistant"
    assert content["usage"]["completion_tokens"] == 5
    assert content["zephyra"] == {"mixture": {}, "probabilities": None, "routing_ms": 0.0}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_says_the_same_as_the_whole_answer(client, path):
    prompt = {"prompt": "of law"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "law"}]}
    body = {**prompt, "max_tokens": 20, "temperature": 0.8, "seed": 3}
    whole = (await client.post(path, json=body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(path, json={**body, **options})
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(response)
    choices = [piece["choices"][0] for piece in pieces]
    if path == "/v1/completions":
        assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]
    else:
        assert "".join(c["delta"]["content"] for c in choices) == whole["choices"][0]["message"]["content"]
        assert [c["delta"].get("role") for c in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert pieces[0]["zephyra"]["mixture"] == whole["zephyra"]["mixture"] == {"law@1": 1.0}
    assert all("zephyra" not in piece for piece in pieces[1:])
    assert len({piece["id"] for piece in (*pieces, last)}) == 1


async def test_a_stop_string_ends_the_answer(client):
    body = {"model": "base", "prompt": "hi", "max_tokens": 30}
    text = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    stop = text[len(text) // 2]
    content = (await client.post("/v1/completions", json={**body, "stop": stop})).json()
    assert content["choices"][0] == {
        "index": 0,
        "text": text[: text.index(stop)],
        "logprobs": None,
        "finish_reason": "stop",
    }


async def test_nulls_mean_the_defaults_as_openais_clients_send_them(client):
    body = {"model": "base", "prompt": "hi", "max_tokens": 4}
    nulls = dict.fromkeys(CompletionBody.model_fields.keys() - body.keys() - {"stream"})
    assert len(nulls) > 15
    first, second = [(await client.post("/v1/completions", json=b)).json() for b in (body, {**body, **nulls})]
    assert first["choices"] == second["choices"]


NEUTRAL = {
    "store": True,
    "metadata": {"team": "a"},
    "service_tier": "auto",
    "user": "u",
    "safety_identifier": "u",
    "prompt_cache_key": "k",
}
"""Fields that OpenAI's clients send and that change nothing here."""


async def test_what_openais_clients_send_besides_changes_nothing(client):
    plain = {"model": "base", "max_tokens": 8}
    of_chats = {
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "reasoning_effort": "none",
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    }
    of_completions = {"echo": False, "best_of": 1, "suffix": ""}
    for path, prompt, own in (
        ("/v1/completions", {"prompt": "hi"}, of_completions),
        ("/v1/chat/completions", {"messages": HI}, of_chats),
    ):
        bodies = ({**plain, **prompt}, {**plain, **prompt, **NEUTRAL, **own})
        first, second = [(await client.post(path, json=body)).json() for body in bodies]
        assert first["choices"] == second["choices"]


async def test_a_developers_parts_and_an_answer_sent_back_are_the_turns_they_stand_for(client):
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    answer = {"role": "assistant", "content": "Hello."}
    old = [{"role": "system", "content": "Be brief.\nBe kind."}, *HI, answer, *HI]
    new = [{"role": "developer", "content": parts}, *HI, {**answer, "refusal": None}, *HI]
    body = {"model": "base", "max_tokens": 8}
    first, second = [
        (await client.post("/v1/chat/completions", json={**body, "messages": messages})).json()
        for messages in (old, new)
    ]
    assert first["choices"] == second["choices"]
    assert first["usage"] == second["usage"]


async def test_models_routes_and_health(client):
    models = (await client.get("/v1/models")).json()
    assert [m["id"] for m in models["data"]] == ["base", "zephyra", "zephyra:law", "zephyra:math", "zephyra:sql"]
    by_prompt = (await client.post("/v1/route", json={"prompt": "of sql"})).json()
    by_chat = (await client.post("/v1/route", json={"messages": [{"role": "user", "content": "of sql"}]})).json()
    assert by_prompt["mixture"] == by_chat["mixture"] == {"sql@1": 1.0}
    health = (await client.get("/health")).json()
    assert health == {"status": "ok", "generation": 4, "domains": 3, "router": None}


@pytest.mark.parametrize("case", BAD_REQUESTS, ids=lambda case: case.name)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_requests_get_a_sentence_and_a_status_also_before_a_stream(client, case, stream):
    body = json.dumps({**case.http_body, "stream": stream})
    response = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == case.http_status
    check_sentence(error_of(response)["message"], case)


BAD_BODIES = [
    ("/v1/completions", {"prompt": "hi", "max_tokns": 3}, ["max_tokns", "max_tokens"], "max_tokns"),
    ("/v1/completions", {"max_tokens": 3}, ["prompt", "missing"], "prompt"),
    ("/v1/completions", {"prompt": ["hi"]}, ["prompt", "string"], "prompt"),
    ("/v1/completions", {"prompt": "hi", "max_tokens": "3"}, ["max_tokens", "'3'", "integer"], "max_tokens"),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 1.5}, ["max_tokens", "1.5", "integer"], "max_tokens"),
    ("/v1/completions", {"prompt": "hi", "temperature": "hot"}, ["temperature", "'hot'", "number"], "temperature"),
    ("/v1/completions", {"prompt": "hi", "temperature": 11}, ["temperature", "11", "10"], None),
    ("/v1/completions", {"prompt": "hi", "stop": 3}, ["stop", "3", "list of strings"], "stop"),
    ("/v1/completions", {"prompt": "hi", "n": 2.5}, ["n", "2.5", "integer"], "n"),
    ("/v1/completions", {"prompt": "hi", "logit_bias": {"a": 1}}, ["logit_bias", "'a'", "token ids"], None),
    ("/v1/completions", {"prompt": "hi", "logit_bias": {"07": 1}}, ["logit_bias", "'07'", "token ids"], None),
    (
        "/v1/completions",
        {"prompt": "hi", "logit_bias": {"7": "x"}},
        ["logit_bias.7", "'x'", "number"],
        "logit_bias",
    ),
    ("/v1/completions", {"prompt": "hi", "logit_bias": [7]}, ["logit_bias", "[7]", "dictionary"], "logit_bias"),
    ("/v1/completions", {"prompt": "hi", "stop_token_ids": ["7"]}, ["stop_token_ids.0", "'7'"], "stop_token_ids"),
    ("/v1/completions", {"prompt": "hi", "logprobs": True}, ["logprobs", "True", "integer"], "logprobs"),
    ("/v1/chat/completions", {"messages": HI, "logprobs": 3}, ["logprobs", "3", "boolean"], "logprobs"),
    (
        "/v1/chat/completions",
        {"messages": HI, "top_logprobs": 3},
        ["top_logprobs is 3", "logprobs is not true"],
        None,
    ),
    (
        "/v1/chat/completions",
        {"messages": HI, "top_logprobs": 21, "logprobs": True},
        ["logprobs is 21", "0 to 20"],
        None,
    ),
    ("/v1/completions", {"prompt": "hi", "mixture": {"law": "x"}}, ["mixture.law", "'x'", "number"], "mixture"),
    ("/v1/completions", {"prompt": "hi", "stream_options": {}}, ["stream_options"], None),
    ("/v1/completions", {"prompt": "hi", "model": "gpt-4"}, ["gpt-4", "zephyra:law"], None),
    ("/v1/chat/completions", {"messages": []}, ["empty"], None),
    ("/v1/chat/completions", {"messages": [{"role": "bot", "content": "x"}]}, ["role", "'bot'"], "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "name": "y"}]}, ["name"], "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, ["messages.0.content' is 3"], "messages"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ["messages.0.content.0.type", "'image_url'", "'text'"],
        "messages",
    ),
    (
        "/v1/chat/completions",
        {"messages": HI, "tools": [{"type": "function"}]},
        ["1 tools", "none is ever called"],
        None,
    ),
    (
        "/v1/chat/completions",
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        ["response_format.type", "'json_schema'", "'text'"],
        "response_format",
    ),
    (
        "/v1/chat/completions",
        {"messages": HI, "reasoning_effort": "high"},
        ["reasoning_effort", "'high'", "'none'"],
        "reasoning_effort",
    ),
    ("/v1/completions", {"prompt": "hi", "echo": True}, ["echo", "True"], "echo"),
    ("/v1/completions", {"prompt": "hi", "best_of": 2}, ["best_of", "2"], "best_of"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, ["assistant", "user"], None),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "max_completion_tokens": 4},
        ["max_tokens is 3", "max_completion_tokens is 4"],
        None,
    ),
    ("/v1/route", {}, ["prompt or messages"], None),
    ("/v1/route", {"prompt": "x", "messages": []}, ["prompt or messages"], None),
    ("/v1/route", {"prompt": ""}, ["empty"], None),
]


@pytest.mark.parametrize(("path", "body", "words", "param"), BAD_BODIES)
async def test_bodies_that_are_not_what_was_expected(client, path, body, words, param):
    response = await client.post(path, json=body)
    assert response.status_code == (404 if body.get("model") == "gpt-4" else 400)
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\xff\xfe", "JSON"),
        (b"\xff{}", "UTF-8"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "hi"', "JSON"),
        (b"", "JSON"),
        (b"[]", "JSON object"),
        (b'"hi"', "JSON object"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b"[" * 100_000, ""),
        (b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}", ""),
    ],
)
async def test_bodies_that_are_no_json_text(client, content, word):
    response = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert word in error_of(response)["message"]


async def test_a_body_beyond_the_limit_is_refused_whether_announced_or_not(client):
    body = b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}'

    async def unannounced():
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    for content in (body, unannounced()):
        response = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert str(MAX_BODY_BYTES) in error_of(response)["message"]


async def test_paths_and_methods_that_are_not_there(client):
    assert error_of(await client.get("/v1/nothing"))["message"].startswith("There is nothing at /v1/nothing;")
    response = await client.get("/v1/completions")
    assert response.status_code == 405
    assert "GET is not possible" in error_of(response)["message"]


class FailingReplica:
    """Raises at once, or after some chunks."""

    def __init__(self, error, chunks=()):
        self.error, self.chunks = error, chunks

    async def generate(self, request):
        for chunk in self.chunks:
            yield chunk
        raise self.error


async def test_health_is_503_while_no_replica_answers(root):
    async with client_of(Gateway(LocalHandle(WordRouter(DOMAINS)), GoneHandle(), str(root))) as client:
        response = await client.get("/health")
    assert (response.status_code, error_of(response)["code"]) == (503, "replica_lost")


async def test_a_full_queue_says_when_to_come_back(root):
    replica = FailingReplica(Overloaded("256 requests are waiting, which is the most; try again in a moment."))
    gateway = Gateway(LocalHandle(WordRouter(DOMAINS)), LocalHandle(replica), str(root))
    async with client_of(gateway) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert error_of(response)["type"] == "rate_limit_error"


async def test_a_deadline_that_passed_is_504(root):
    replica = FailingReplica(DeadlineExceeded("The answer was not complete within 2 s; allow more."))
    gateway = Gateway(LocalHandle(WordRouter(DOMAINS)), LocalHandle(replica), str(root))
    async with client_of(gateway) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", "timeout_s": 2.0})
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")


async def test_a_bug_is_logged_and_not_shown(root, caplog):
    replica = FailingReplica(RuntimeError("secret"))
    gateway = Gateway(LocalHandle(WordRouter(DOMAINS)), LocalHandle(replica), str(root))
    with caplog.at_level(logging.ERROR):
        async with client_of(gateway) as client:
            headers = {"x-request-id": "r-17"}
            response = await client.post("/v1/completions", json={"prompt": "hi"}, headers=headers)
    assert response.status_code == 500
    assert error_of(response)["message"] == "Internal error in request r-17; it has been logged."
    assert "RuntimeError: secret" in caplog.text


async def test_an_error_within_a_stream_is_its_last_event(root, system):
    first, *_ = [chunk async for chunk in system.replica.generate(LONG_REQUEST)]
    replica = FailingReplica(Overloaded("No more."), [first])
    gateway = Gateway(LocalHandle(WordRouter(DOMAINS)), LocalHandle(replica), str(root))
    async with client_of(gateway) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", "stream": True})
    assert response.status_code == 200
    piece, error = [json.loads(block.removeprefix("data: ")) for block in response.text.split("\n\n")[:-1]]
    assert piece["choices"][0]["text"] == first.text
    assert error["error"]["message"] == "No more."
