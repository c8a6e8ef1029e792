"""Several choices, log-probabilities and what steers the sampler, over the HTTP wire in OpenAI's shapes."""

import pytest

from tests.nano import nano_base
from tests.serving.http_client import HI, events

pytestmark = pytest.mark.anyio


async def completed(client, path="/v1/completions", **body):
    """The whole answer to `hi` of the plain base."""
    prompt = {"prompt": "hi"} if path == "/v1/completions" else {"messages": HI}
    response = await client.post(path, json={"model": "base", "max_tokens": 8, **prompt, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_logprobs_of_a_completion(client):
    content = await completed(client, logprobs=2, max_tokens=30)
    choice, plain = content["choices"][0], (await completed(client, max_tokens=30))["choices"][0]
    assert plain["logprobs"] is None
    assert choice["text"] == plain["text"]
    report = choice["logprobs"]
    assert {key: len(value) for key, value in report.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), 30
    )
    assert report["text_offset"][0] == 0
    for token, logprob, top, offset in zip(*report.values(), strict=True):
        # Greedy: the token itself is the likeliest, and listed first.
        assert next(iter(top.items())) == (token, logprob)
        assert len(top) == 2
        assert all(value <= logprob <= 0 for value in top.values())
        if not token.startswith(("\\x", "<|")):
            assert choice["text"][offset : offset + len(token)] == token
    assert any(offset for offset in report["text_offset"])


async def test_a_token_that_is_not_among_the_likeliest_is_listed_beside_them(client, root):
    unlikely = nano_base(root).tokenizer.encode("z", add_special_tokens=False)[0]
    report = (await completed(client, logprobs=1, logit_bias={str(unlikely): 100}))["choices"][0]["logprobs"]
    assert report["tokens"] == ["z"] * 8
    # The bias is no part of what is reported.
    for logprob, top in zip(report["token_logprobs"], report["top_logprobs"], strict=True):
        assert list(top.items())[1:] == [("z", logprob)]
        assert max(top.values()) > logprob


async def test_logprobs_of_a_chat(client):
    chat = "/v1/chat/completions"
    choice = (await completed(client, chat, logprobs=True, top_logprobs=3, max_tokens=30))["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 30
    text = b"".join(bytes(token["bytes"] or []) for token in content).decode(errors="replace")
    assert text == choice["message"]["content"]
    for token in content:
        assert sorted(token) == ["bytes", "logprob", "token", "top_logprobs"]
        assert [sorted(other) for other in token["top_logprobs"]] == [["bytes", "logprob", "token"]] * 3
        assert token["top_logprobs"][0] == {key: token[key] for key in ("token", "logprob", "bytes")}
    without_top = (await completed(client, chat, logprobs=True, max_tokens=30))["choices"][0]["logprobs"]["content"]
    assert without_top == [{**token, "top_logprobs": []} for token in content]
    for off in ({}, {"logprobs": False}):
        assert (await completed(client, chat, **off))["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("path", "logprobs"),
    [("/v1/completions", {"logprobs": 2}), ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2})],
)
async def test_a_stream_of_choices_says_the_same_as_the_whole_answer(client, path, logprobs):
    prompt = {"prompt": "hi"} if path == "/v1/completions" else {"messages": HI}
    body = {**prompt, **logprobs, "model": "base", "n": 3, "max_tokens": 12, "temperature": 1.5, "seed": 4}
    whole = (await client.post(path, json=body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = events(await client.post(path, json={**body, **options}))
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert last["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 36
    alone = await completed(client, path, max_tokens=1)
    assert whole["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert len({str(choice["logprobs"]) for choice in whole["choices"]}) == 3
    for choice in whole["choices"]:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        if path == "/v1/completions":
            assert "".join(c["text"] for c in own) == choice["text"]
        else:
            assert "".join(c["delta"]["content"] for c in own) == choice["message"]["content"]
            assert [c["delta"].get("role") for c in own] == ["assistant"] + [None] * (len(own) - 1)
        if path == "/v1/completions":
            for key in ("tokens", "text_offset"):
                assert [item for c in own for item in c["logprobs"][key]] == choice["logprobs"][key]
            streamed = [logprob for c in own for logprob in c["logprobs"]["token_logprobs"]]
            assert streamed == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
        else:
            streamed, whole_content = [t for c in own for t in c["logprobs"]["content"]], choice["logprobs"]["content"]
            assert [t["token"] for t in streamed] == [t["token"] for t in whole_content]
            assert [t["logprob"] for t in streamed] == pytest.approx([t["logprob"] for t in whole_content], abs=1e-4)
    first_of_second = next(i for i, piece in enumerate(pieces) if piece["choices"][0]["index"] == 1)
    last_of_first = max(i for i, piece in enumerate(pieces) if piece["choices"][0]["index"] == 0)
    assert first_of_second < last_of_first, "the choices came one after the other"
    assert ["zephyra" in piece for piece in pieces] == [True] + [False] * (len(pieces) - 1)


async def test_bias_penalties_and_stop_tokens_reach_the_sampler(client, root):
    tokenizer = nano_base(root).tokenizer
    end, wanted = tokenizer.eos_token_id, tokenizer.encode("z", add_special_tokens=False)[0]
    biased = await completed(client, logit_bias={str(wanted): 100})
    assert biased["choices"][0]["text"] == "z" * 8
    stopped = await completed(client, logit_bias={str(wanted): 100}, stop_token_ids=[wanted])
    assert (stopped["choices"][0]["text"], stopped["choices"][0]["finish_reason"]) == ("z", "stop")
    ended = await completed(client, logit_bias={str(end): 100})
    assert (ended["usage"]["completion_tokens"], ended["choices"][0]["finish_reason"]) == (1, "stop")
    ignored = await completed(client, logit_bias={str(end): 100}, ignore_eos=True)
    assert (ignored["usage"]["completion_tokens"], ignored["choices"][0]["finish_reason"]) == (8, "length")
    plain = (await completed(client))["choices"][0]["text"]
    assert (await completed(client, repetition_penalty=50.0, presence_penalty=2.0))["choices"][0]["text"] != plain
    assert (await completed(client, min_p=1.0, temperature=5.0, seed=1))["choices"][0]["text"] == plain
