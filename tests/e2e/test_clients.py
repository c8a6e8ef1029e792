"""Clients that others wrote, against the served starter: they need to be told nothing but where it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.e2e.conftest import CHECKOUT

pytestmark = [pytest.mark.starter, pytest.mark.ray]

QUESTION, ANSWER = "What is the capital of France?", "Paris"
ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(served: tuple[str, str, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def test_openai_whole_and_streamed(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="zephyra", messages=ASKED)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (ANSWER, "stop")
    assert chat.usage is not None
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    options: openai.types.chat.ChatCompletionStreamOptionsParam = {"include_usage": True}
    with client.chat.completions.create(model="zephyra", messages=ASKED, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage == chat.usage
    completion = client.completions.create(model="zephyra", prompt=QUESTION)
    assert completion.choices[0].text == ANSWER
    text = "".join(
        chunk.choices[0].text for chunk in client.completions.create(model="zephyra", prompt=QUESTION, stream=True)
    )
    assert text == ANSWER
    assert {"zephyra", "base", "zephyra:capitals"} <= {model.id for model in client.models.list()}


TURNS = [*ASKED, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "and of Spain?"}]
"""A chat as it goes over the wire."""


def plainly_answered(served: tuple[str, str, str]) -> Any:
    """The answer to `TURNS` without any client's help."""
    body = {"model": "zephyra", "messages": TURNS}
    return httpx.post(f"{served[0]}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"][
        "content"
    ]


def test_openai_goes_on_with_the_answer_it_was_given(client: openai.OpenAI, served: tuple[str, str, str]) -> None:
    first = client.chat.completions.create(model="zephyra", messages=ASKED).choices[0].message
    follow_up: ChatCompletionMessageParam = {"role": "user", "content": [{"type": "text", "text": "and of Spain?"}]}
    # As people do it: the message itself, not a dictionary of it.
    second = client.chat.completions.create(model="zephyra", messages=[*ASKED, first, follow_up])
    assert second.choices[0].message.content == plainly_answered(served)


def test_openai_with_a_mixture_and_what_it_sends_besides(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="zephyra",
        messages=ASKED,
        store=True,
        metadata={"team": "a"},
        response_format={"type": "text"},
        service_tier="auto",
        parallel_tool_calls=True,
        extra_body={"mixture": {"capitals": 0.75, "roman": 0.25}},
    )
    assert chat.model_extra is not None
    mixture = chat.model_extra["zephyra"]["mixture"]
    assert {name.partition("@")[0]: weight for name, weight in mixture.items()} == {"capitals": 0.75, "roman": 0.25}
    alone = client.chat.completions.create(model="base", messages=ASKED, extra_body={"mixture": {"capitals": 1.0}})
    assert alone.choices[0].message.content == ANSWER


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=ASKED)
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")
    assert "zephyra:capitals" in missing.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="zephyra", prompt="a b c " * 10_000)
    assert long.value.code == "context_length_exceeded"
    tool: openai.types.chat.ChatCompletionToolParam = {"type": "function", "function": {"name": "x"}}
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model="zephyra", messages=ASKED, tools=[tool])
    assert "none is ever called" in tools.value.message
    with pytest.raises(openai.InternalServerError) as late:
        client.chat.completions.create(model="zephyra", messages=ASKED, extra_body={"timeout_s": 1e-6})
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")


def test_langchain(served: tuple[str, str, str]) -> None:
    chat = ChatOpenAI(base_url=f"{served[0]}/v1", api_key="none", model="zephyra", max_retries=0)
    whole = chat.invoke(QUESTION)
    assert whole.content == ANSWER
    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata is not None
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION)) == ANSWER
    assert chat.invoke([HumanMessage(QUESTION), whole, HumanMessage("and of Spain?")]).content == plainly_answered(
        served
    )
    mixed = chat.bind(extra_body={"mixture": {"capitals": 1.0}})
    assert mixed.invoke(QUESTION).content == ANSWER
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(base_url=f"{served[0]}/v1", api_key="none", model="gpt-4o").invoke(QUESTION)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_curl(served: tuple[str, str, str]) -> None:
    def curl(body: dict[str, object], *options: str) -> str:
        command = ["curl", "-sS", f"{served[0]}/v1/completions", *options]
        command += ["-H", "content-type: application/json", "-d", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    assert json.loads(curl({"prompt": QUESTION}))["choices"][0]["text"] == ANSWER
    lines = [
        line.removeprefix("data: ") for line in curl({"prompt": QUESTION, "stream": True}, "-N").splitlines() if line
    ]
    assert lines.pop() == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == ANSWER
    answer, _, status = curl({"prompt": ""}, "-w", "\n%{http_code}").rpartition("\n")
    assert (status, json.loads(answer)["error"]["code"]) == ("400", "invalid_input")


def test_a_grpc_client_made_from_the_published_proto(served: tuple[str, str, str], tmp_path: Path) -> None:
    script, proto = Path(__file__).with_name("grpc_client.py"), CHECKOUT / "deployments/protos/zephyra.proto"
    # Elsewhere and in a process of its own: nothing of ours can be imported, and no message type is known twice.
    command = [sys.executable, "-I", str(script), str(proto), str(tmp_path), served[1], QUESTION]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["whole"], said["streamed"], said["mixture"]) == (ANSWER, ANSWER, ["capitals"])
    assert (said["code"], "astrology" in said["details"]) == ("NOT_FOUND", True)
