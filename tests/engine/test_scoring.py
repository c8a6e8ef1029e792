"""Given answers scored in the batch, against one plain forward pass of merged weights; and what they do to others."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.sampler import score
from cluster.engine.scheduler import MAX_WANTED
from cluster.errors import DeadlineExceeded, InvalidInput, InvalidMixture, PromptTooLong
from cluster.messages import FinishReason, GenerateRequest, Mixture, SamplingParams
from cluster.model.base import encode_answer, encode_prompt
from tests.engine.systems import (
    CONTEXT_TOKENS,
    MIXTURES,
    PROMPTS,
    RUNNERS,
    System,
    ref,
    request,
    teacher_forced,
    tokenizer,
)
from tests.engine.test_isolation import huge_adapter

ANSWERS = ("Paris", "The capital is Rome.", "42", "数字 😀", "<|assistant|>", "over the lazy dog " * 3)
LONG = "over the lazy dog, " * 20
TOLERANCE = 1e-4


def scoring(
    request_id: str, answer: str, prompt: str = PROMPTS[1], mixture: Mixture = MIXTURES[0], priority: int = 0
) -> GenerateRequest:
    return GenerateRequest(request_id, prompt, mixture, SamplingParams(), priority, answer=answer)


def expected_logprobs(kind: str, given_request: GenerateRequest) -> list[float]:
    """Of the answer's tokens: one forward pass over prompt and answer, no engine, no cache, weights merged."""
    assert isinstance(given_request.prompt, str)
    assert given_request.answer is not None
    ids = encode_answer(tokenizer(), given_request.answer)
    logits_TV = teacher_forced(kind, given_request.prompt, given_request.mixture, ids)
    return logits_TV.double().log_softmax(dim=-1)[range(len(ids)), ids].tolist()


def check_scored(system: System, kind: str, given_request: GenerateRequest) -> None:
    seen, expected = system.observed[given_request.request_id], expected_logprobs(kind, given_request)
    assert seen.finish_reason is FinishReason.STOP
    assert (seen.text, len(seen.token_ids)) == (given_request.answer, len(expected))
    assert [one.token_id for one in seen.logprobs] == seen.token_ids
    assert seen.prompt_tokens == len(encode_prompt(tokenizer(), given_request.prompt))
    logprobs = [one.logprob for one in seen.logprobs]
    assert logprobs == pytest.approx(expected, abs=TOLERANCE)
    assert math.fsum(logprobs) == pytest.approx(math.fsum(expected), abs=TOLERANCE)


_asked = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(MIXTURES),
    st.none() | st.sampled_from(ANSWERS),
    st.integers(0, 4),
)
"""Prompt, mixture, the answer to score (none: ten tokens are generated), steps until the next request arrives."""


def play(system: System, plan: list[tuple[str, Mixture, str | None, int]]) -> list[GenerateRequest]:
    """Submit each, and take so many steps before the next; then go on until all have ended."""
    requests = []
    for index, (prompt, mixture, answer, pause) in enumerate(plan):
        generated = request(f"r{index}", prompt, mixture, max_tokens=10, ignore_eos=True, logprobs=0)
        requests.append(replace(generated, answer=answer, priority=index % 2))
        system.submit(requests[-1])
        for _ in range(pause):
            system.deliver()
            system.step()
    system.run()
    return requests


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", ["zephyra", "qwen2"])
@settings(deadline=None, max_examples=8)
@given(
    plan=st.lists(_asked, min_size=1, max_size=8),
    spare_step_tokens=st.integers(0, 40),
    small_cache=st.booleans(),
    reuse_prefixes=st.booleans(),
)
def test_scores_are_those_of_a_plain_forward_pass(kind, runner, plan, spare_step_tokens, small_cache, reuse_prefixes):
    system = System(
        kind,
        runner,
        num_blocks=CONTEXT_TOKENS // 16 if small_cache else None,
        max_batch_size=4,
        max_step_tokens=4 + spare_step_tokens,
        reuse_prefixes=reuse_prefixes,
    )
    for given_request in play(system, plan):
        if given_request.answer is not None:
            check_scored(system, kind, given_request)


@settings(deadline=None, max_examples=8)
@given(plan=st.lists(_asked, min_size=2, max_size=6), spare_step_tokens=st.integers(0, 40))
def test_on_the_native_kernels_neither_changes_a_bit_of_the_other(plan, spare_step_tokens):
    """Whatever is scored or generated beside it, a sequence's log-probabilities are those that it has alone."""
    crowded = System("zephyra", num_blocks=12, max_batch_size=4, max_step_tokens=4 + spare_step_tokens)
    for given_request in play(crowded, plan):
        alone = System("zephyra", max_batch_size=1, reuse_prefixes=False)
        alone.submit(given_request)
        seen = alone.run()[given_request.request_id]
        assert crowded.observed[given_request.request_id].logprobs == seen.logprobs


def test_scores_are_what_generation_reports_of_the_same_tokens():
    """To the last bit on the native kernels: an answer read in one piece, and the same made token by token."""
    num_compared = 0
    for index, prompt in enumerate(PROMPTS):
        system = System("zephyra")
        system.submit(request("made", prompt, MIXTURES[index], max_tokens=6, ignore_eos=True, logprobs=0))
        made = system.run()["made"]
        if encode_answer(tokenizer(), made.text) != made.token_ids:
            continue  # There is another way to cut this text into tokens.
        system.submit(scoring("given", made.text, prompt, MIXTURES[index]))
        assert system.run()["given"].logprobs == made.logprobs
        num_compared += 1
    assert num_compared >= 2


def test_an_answer_that_gave_way_is_scored_anew():
    # One token of it a step, while the one before it grows until no block is free.
    system = System("zephyra", num_blocks=CONTEXT_TOKENS // 16, max_batch_size=2, max_step_tokens=2)
    late = scoring("late", LONG)
    system.submit(request("grows", PROMPTS[0], max_tokens=100, ignore_eos=True))
    system.submit(late)
    system.run()
    assert system.engine.stats().num_preemptions == 1
    num_tokens = len(encode_answer(tokenizer(), LONG))
    assert num_tokens < len(system.runner.logits["late"]) < 2 * num_tokens, "some of it was scored twice"
    check_scored(system, "zephyra", late)


def test_a_step_makes_few_rows_of_logits_of_one_answer():
    system = System("zephyra")
    long = scoring("long", LONG)
    system.submit(long)
    num_rows = [0]
    while system.engine.has_work:
        system.step()
        num_rows.append(len(system.runner.logits.get("long", ())))
    assert max(after - before for before, after in pairwise(num_rows)) == MAX_WANTED
    check_scored(system, "zephyra", long)


def test_what_all_answers_follow_is_read_once_and_each_answer_whole():
    system = System("zephyra")
    prompt = PROMPTS[4]
    num_prompt = len(encode_prompt(tokenizer(), prompt))
    for index, answer in enumerate(ANSWERS):
        before = system.engine.stats()
        given_request = scoring(f"r{index}", answer, prompt, MIXTURES[5])
        system.submit(given_request)
        system.run()
        check_scored(system, "zephyra", given_request)
        after = system.engine.stats()
        # The last token of the prompt gives the logits of the answer's first.
        reusable = (num_prompt - 1) // 16 * 16 if index else 0
        assert after.num_reused_tokens - before.num_reused_tokens == reusable
        num_answer = len(encode_answer(tokenizer(), answer))
        assert after.num_prompt_tokens - before.num_prompt_tokens == num_prompt + num_answer - 1 - reusable
    assert after.num_generated_tokens == 0
    assert after.num_finished == len(ANSWERS)


@pytest.mark.parametrize("value", [1e30, 3e38])
def test_logits_that_are_not_finite_are_an_error_and_others_go_on(value):
    system = System("zephyra")
    system.adapters[ref("huge")] = huge_adapter(value)
    broken, sound = scoring("broken", LONG, mixture=Mixture.of({ref("huge"): 1.0})), scoring("sound", LONG)
    for given_request in (broken, sound):
        system.submit(given_request)
    system.run()
    assert isinstance(system.observed["broken"].error, InvalidMixture)
    assert system.observed["broken"].finish_reason is FinishReason.ERROR
    check_scored(system, "zephyra", sound)


def test_an_answer_must_have_tokens_and_fit_the_context():
    system = System("zephyra")
    with pytest.raises(InvalidInput, match="'' has no tokens"):
        system.submit(scoring("r", ""))
    words = "a " * CONTEXT_TOKENS
    num_prompt, ids = len(encode_prompt(tokenizer(), PROMPTS[1])), encode_answer(tokenizer(), words)
    with pytest.raises(PromptTooLong, match=f"{num_prompt} tokens and the answer has {len(ids)}: .*{CONTEXT_TOKENS}"):
        system.submit(scoring("r", words))
    fits = tokenizer().decode(ids[: CONTEXT_TOKENS - num_prompt])
    assert num_prompt + len(encode_answer(tokenizer(), fits)) == CONTEXT_TOKENS
    whole = scoring("r", fits)
    system.submit(whole)
    system.run()
    check_scored(system, "zephyra", whole)


def test_a_deadline_and_a_cancellation_end_scoring_and_free_all():
    system = System("zephyra", max_step_tokens=16)
    system.submit(replace(scoring("late", LONG), timeout_s=-1.0))
    system.submit(scoring("left", LONG))
    system.step()
    assert isinstance(system.observed["late"].error, DeadlineExceeded)
    system.engine.cancel("left")
    system.engine.check_integrity()
    stats = system.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_finished) == (0, 0, 0)
    assert stats.num_free_kv_blocks == stats.num_kv_blocks


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 40),
    num_rows=st.integers(1, 5),
    scale=st.sampled_from([3.0, 1e37]),
    broken=st.none() | st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_scores_of_tokens_are_log_softmax(seed, vocab_size, num_rows, scale, broken):
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randn(num_rows, vocab_size, generator=generator) * scale
    ids = torch.randint(vocab_size, (num_rows,), generator=generator).tolist()
    expected = logits_RV.double().log_softmax(dim=-1)[range(num_rows), ids].tolist()
    if broken is not None:
        logits_RV[-1, 0] = broken
    seen = score(logits_RV, ids)
    assert (seen[-1] is None) == (broken is not None)
    for one, token_id, logprob in zip(seen, ids, expected, strict=True):
        if one is not None:
            assert (one.token_id, one.top) == (token_id, ())
            assert one.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-5)
            assert one.logprob <= 0
