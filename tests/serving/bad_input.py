"""Requests that cannot be answered, the same over both wires, and what each wire must say."""

from dataclasses import dataclass

import grpc

from cluster.messages import MAX_PROMPT_CHARACTERS
from deployments.protos import zephyra_pb2 as pb
from tests.nano import CONTEXT_TOKENS

NAN = float("nan")


@dataclass(frozen=True)
class BadRequest:
    """One request in both forms; `names` are words that the sentence must hold."""

    name: str
    http_body: dict
    http_status: int
    grpc_request: pb.GenerateRequest
    grpc_code: grpc.StatusCode
    names: tuple[str, ...]


def _mixture(*entries: tuple[str, float]) -> pb.Mixture:
    return pb.Mixture(entries=[pb.MixtureEntry(domain=domain, weight=weight) for domain, weight in entries])


def _bad(name, http, grpc_fields, *names, status=400, code=grpc.StatusCode.INVALID_ARGUMENT):
    return BadRequest(
        name, {"prompt": "hi", **http}, status, pb.GenerateRequest(**{"prompt": "hi", **grpc_fields}), code, names
    )


_LONG = "a b c d " * CONTEXT_TOKENS
_HUGE = "x" * (MAX_PROMPT_CHARACTERS + 1)
_NOT_FOUND = {"status": 404, "code": grpc.StatusCode.NOT_FOUND}

BAD_REQUESTS = [
    _bad("unknown domain", {"model": "zephyra:art"}, {"domain": "art"}, "art", "law, math, sql", **_NOT_FOUND),
    _bad(
        "unknown domain in a mixture",
        {"mixture": {"law": 1, "art": 1}},
        {"mixture": _mixture(("law", 1), ("art", 1))},
        "art",
        "law, math, sql",
        **_NOT_FOUND,
    ),
    _bad("unknown version", {"model": "zephyra:law@99"}, {"domain": "law@99"}, "law@99", **_NOT_FOUND),
    _bad("no version", {"model": "zephyra:law@9x"}, {"domain": "law@9x"}, "law@9x", "law@3"),
    _bad("a path", {"model": "zephyra:../law@1"}, {"domain": "../law@1"}, "../law", "cannot name a domain"),
    _bad("endless version", {"model": "zephyra:law@" + "9" * 5000}, {"domain": "law@" + "9" * 5000}, "law@99"),
    _bad("empty prompt", {"prompt": ""}, {"prompt": ""}, "empty", "at least one character"),
    _bad("blank prompt", {"prompt": " \n"}, {"prompt": " \n"}, "empty"),
    _bad("over-long prompt", {"prompt": _LONG}, {"prompt": _LONG}, str(CONTEXT_TOKENS), "shorten"),
    _bad("huge prompt", {"prompt": _HUGE}, {"prompt": _HUGE}, str(MAX_PROMPT_CHARACTERS)),
    _bad("NaN weight", {"mixture": {"law": NAN}}, {"mixture": _mixture(("law", NAN))}, "law", "nan", "finite"),
    _bad("infinite weight", {"mixture": {"law": 1e999}}, {"mixture": _mixture(("law", 1e999))}, "law", "inf"),
    _bad("negative weight", {"mixture": {"law": -1}}, {"mixture": _mixture(("law", -1))}, "law", "-1", "negative"),
    _bad("zero weights", {"mixture": {"law": 0}}, {"mixture": _mixture(("law", 0))}, "zero", "law"),
    _bad(
        "one adapter twice",
        {"mixture": {"law": 1, "law@1": 1}},
        {"mixture": _mixture(("law", 1), ("law@1", 1))},
        "law@1",
        "twice",
    ),
    _bad("no tokens", {"max_tokens": 0}, {"sampling": pb.Sampling(max_tokens=0)}, "max_tokens", "0", "at least 1"),
    _bad(
        "tokens beyond the context",
        {"max_tokens": CONTEXT_TOKENS},
        {"sampling": pb.Sampling(max_tokens=CONTEXT_TOKENS)},
        str(CONTEXT_TOKENS),
    ),
    _bad("NaN temperature", {"temperature": NAN}, {"sampling": pb.Sampling(temperature=NAN)}, "temperature", "nan"),
    _bad("top_p of 0", {"top_p": 0}, {"sampling": pb.Sampling(top_p=0)}, "top_p", "above 0"),
    _bad("negative top_k", {"top_k": -1}, {"sampling": pb.Sampling(top_k=-1)}, "top_k", "-1"),
    _bad("negative seed", {"seed": -1}, {"sampling": pb.Sampling(seed=-1)}, "seed", "-1"),
    _bad("NaN min_p", {"min_p": NAN}, {"sampling": pb.Sampling(min_p=NAN)}, "min_p", "nan", "0 to 1"),
    _bad(
        "repetition penalty of 0",
        {"repetition_penalty": 0},
        {"sampling": pb.Sampling(repetition_penalty=0)},
        "repetition_penalty",
        "0.01 to 100",
    ),
    _bad(
        "presence penalty beyond OpenAI's",
        {"presence_penalty": 3},
        {"sampling": pb.Sampling(presence_penalty=3)},
        "presence_penalty",
        "-2 to 2",
    ),
    _bad(
        "bias beyond OpenAI's", {"logit_bias": {"5": 101}}, {"sampling": pb.Sampling(logit_bias={5: 101})}, "logit_bias"
    ),
    _bad(
        "bias of a token that is none",
        {"logit_bias": {"999999": 1}},
        {"sampling": pb.Sampling(logit_bias={999999: 1})},
        "logit_bias",
        "999999",
        "tokens are 0 to",
    ),
    _bad(
        "stop token that is none",
        {"stop_token_ids": [-1]},
        {"sampling": pb.Sampling(stop_token_ids=[-1])},
        "stop_token_ids",
        "-1",
        "tokens are 0 to",
    ),
    _bad(
        "too many stop tokens",
        {"stop_token_ids": [1] * 65},
        {"sampling": pb.Sampling(stop_token_ids=[1] * 65)},
        "stop_token_ids",
        "64",
    ),
    _bad("too many logprobs", {"logprobs": 21}, {"sampling": pb.Sampling(logprobs=21)}, "logprobs", "21", "0 to 20"),
    _bad("no choices", {"n": 0}, {"n": 0}, "n is 0", "1 to 16"),
    _bad("too many choices", {"n": 17}, {"n": 17}, "n is 17", "1 to 16"),
    _bad("no time", {"timeout_s": 0}, {"timeout_s": 0}, "timeout_s", "above 0"),
    _bad("endless time", {"timeout_s": 1e999}, {"timeout_s": 1e999}, "timeout_s", "inf"),
    _bad("empty stop string", {"stop": [""]}, {"sampling": pb.Sampling(stop=[""])}, "stop"),
]


def check_sentence(sentence: str, case: BadRequest) -> None:
    """One sentence that names the value, what was expected and what to do, and nothing of our insides."""
    for name in case.names:
        assert name in sentence
    assert "\n" not in sentence
    assert sentence.endswith((".", "..."))
    assert len(sentence) <= 1000
    for inside in ("Traceback", "ray.", ".py", "/tmp", "Error("):
        assert inside not in sentence
