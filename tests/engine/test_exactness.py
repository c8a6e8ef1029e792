"""The engine against plain `generate` on merged weights: any arrivals, cancellations, batch sizes and mixtures."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import FinishReason, GenerateRequest, Mixture
from tests.engine.systems import (
    CONTEXT_TOKENS,
    KINDS,
    LONGEST_ANSWER,
    MIXTURES,
    PROMPTS,
    RUNNERS,
    System,
    bytes_of,
    reference,
    request,
    teacher_forced,
)

LOGITS_TOLERANCE = 1e-4

Planned = tuple[str, Mixture, int, int, int | None]

_request = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(MIXTURES),
    st.integers(1, 12),
    st.integers(0, 6),
    st.none() | st.integers(1, 8),
)
"""Prompt, mixture, max_tokens, steps until the next request arrives, steps from then until it is cancelled."""


def check_against_reference(system: System, kind: str, given_request: GenerateRequest) -> bool:
    """Assert that what came out is what the reference says; return whether every decision was a clear one."""
    seen = system.observed[given_request.request_id]
    prompt, mixture = given_request.prompt, given_request.mixture
    assert isinstance(prompt, str)
    expected = reference(kind, prompt, mixture, given_request.sampling.max_tokens)
    if seen.token_ids:
        logits_TV = torch.stack(system.runner.logits[given_request.request_id])[: len(seen.token_ids)]
        forced_TV = teacher_forced(kind, prompt, mixture, seen.token_ids)
        assert (logits_TV - forced_TV).abs().max() < LOGITS_TOLERANCE
    num_certain = expected.num_certain()
    if seen.finish_reason is not None and num_certain == len(expected.token_ids):
        assert seen.token_ids == expected.token_ids
    assert seen.token_ids[:num_certain] == expected.token_ids[: min(num_certain, len(seen.token_ids))]
    return num_certain == len(expected.token_ids)


def play_requests(plan: list[Planned]) -> list[GenerateRequest]:
    return [
        replace(request(f"r{index}", prompt, mixture, max_tokens=max_tokens), priority=index % 2)
        for index, (prompt, mixture, max_tokens, _, _) in enumerate(plan)
    ]


def play_given(system: System, requests: list[GenerateRequest], pauses: list[int]) -> None:
    """Submit each, and take so many steps before the next."""
    for given_request, pause in zip(requests, pauses, strict=True):
        system.submit(given_request)
        for _ in range(pause):
            system.deliver()
            system.step()
    system.run()


def play(system: System, plan: list[Planned]) -> list[GenerateRequest]:
    """Submit, cancel and step as planned, delivering adapters as they are wanted, until all has ended."""
    requests, cancel_at, now = play_requests(plan), {}, 0
    for index, (_, _, _, pause, cancel_after) in enumerate(plan):
        system.submit(requests[index])
        if cancel_after is not None:
            cancel_at.setdefault(now + cancel_after, []).append(f"r{index}")
        for _ in range(pause):
            for cancelled in cancel_at.pop(now, []):
                system.engine.cancel(cancelled)
                system.engine.check_integrity()
            system.deliver()
            system.step()
            now += 1
    for cancelled in [request_id for ids in cancel_at.values() for request_id in ids]:
        system.engine.cancel(cancelled)
    system.run()
    return requests


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(
    plan=st.lists(_request, min_size=1, max_size=9),
    max_batch_size=st.integers(1, 5),
    spare_step_tokens=st.integers(0, 40),
    small_bank=st.booleans(),
    small_cache=st.booleans(),
    reuse_prefixes=st.booleans(),
)
def test_any_schedule_gives_what_generate_gives(
    kind, runner, plan, max_batch_size, spare_step_tokens, small_bank, small_cache, reuse_prefixes
):
    # Small: room for the largest mixture, or for one sequence of full length, and nothing more, so that adapters come
    # and go, and sequences are preempted.
    system = System(
        kind,
        runner,
        num_blocks=CONTEXT_TOKENS // 16 if small_cache else None,
        max_batch_size=max_batch_size,
        max_step_tokens=max_batch_size + spare_step_tokens,
        adapter_bytes=max(bytes_of(kind, mixture, runner) for mixture in MIXTURES) if small_bank else 2**30,
        reuse_prefixes=reuse_prefixes,
    )
    for given_request in play(system, plan):
        check_against_reference(system, kind, given_request)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", KINDS)
def test_decisions_are_clear_in_99_of_100_sequences(kind, runner):
    """Without this the margin rule above could excuse everything. All that can disturb a sequence happens."""
    rng = random.Random(7)
    # A batch of eight in blocks for fewer, and prompts in pieces.
    system = System(kind, runner, num_blocks=14, max_batch_size=8, max_step_tokens=24)
    combinations = [(prompt, mixture) for prompt in PROMPTS for mixture in MIXTURES]
    rng.shuffle(combinations)
    requests = [
        request(f"r{index}", prompt, mixture, max_tokens=LONGEST_ANSWER)
        for index, (prompt, mixture) in enumerate(combinations * 2)
    ]
    for given_request in requests:
        system.submit(given_request)
        if rng.random() < 0.5:
            system.deliver()
            system.step()
    system.run()
    clear = [check_against_reference(system, kind, given_request) for given_request in requests]
    assert sum(clear) >= 0.99 * len(clear)
    assert all(
        system.observed[r.request_id].finish_reason in (FinishReason.LENGTH, FinishReason.STOP) for r in requests
    )
    stats = system.engine.stats()
    assert stats.num_preemptions > 0
    assert 1 < min(size for size in system.runner.chunk_sizes if size > 1) < 24


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None, max_examples=8)
@given(plan=st.lists(_request, min_size=2, max_size=7), spare_step_tokens=st.integers(0, 40))
def test_on_the_native_kernels_the_schedule_changes_no_bit(kind, dtype, plan, spare_step_tokens):
    """Stronger than the margin rule: whatever ran beside it, a sequence's logits are those it has alone."""
    sampled = [(prompt, mixture, max_tokens, pause, None) for prompt, mixture, max_tokens, pause, _ in plan]
    crowded = System(kind, dtype=dtype, num_blocks=12, max_batch_size=4, max_step_tokens=4 + spare_step_tokens)
    requests = [replace(r, sampling=replace(r.sampling, temperature=0.8, seed=7)) for r in play_requests(sampled)]
    play_given(crowded, requests, [pause for _, _, _, pause, _ in sampled])
    for given_request in requests:
        alone = System(kind, dtype=dtype, max_batch_size=1, reuse_prefixes=False)
        alone.submit(given_request)
        seen = alone.run()[given_request.request_id]
        assert crowded.observed[given_request.request_id].token_ids == seen.token_ids
        logits = (crowded.runner.logits, alone.runner.logits)
        assert torch.equal(*(torch.stack(kept[given_request.request_id]) for kept in logits))


def test_the_mixtures_of_the_tests_matter():
    """Each mixture gives other tokens than the base: an engine that ignored mixtures would fail above."""
    for mixture in MIXTURES[1:]:
        answers = [(reference("zephyra", p, mixture, 12), reference("zephyra", p, MIXTURES[0], 12)) for p in PROMPTS]
        assert any(mixed.token_ids != plain.token_ids for mixed, plain in answers)
