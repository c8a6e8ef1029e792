"""The engine against plain `generate` on merged weights: any arrivals, cancellations, batch sizes and mixtures."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import FinishReason, GenerateRequest
from tests.engine.systems import KINDS, MIXTURES, PROMPTS, System, bytes_of, reference, request, teacher_forced

LOGITS_TOLERANCE = 1e-4

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


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=20)
@given(plan=st.lists(_request, min_size=1, max_size=9), max_batch_size=st.integers(1, 5), small_bank=st.booleans())
def test_any_schedule_gives_what_generate_gives(kind, plan, max_batch_size, small_bank):
    # Small: room for the largest mixture and nothing more, so that adapters come and go.
    budget_bytes = max(bytes_of(kind, mixture) for mixture in MIXTURES) if small_bank else 2**30
    system = System(kind, max_batch_size=max_batch_size, adapter_bytes=budget_bytes)
    requests, cancel_at, now = [], {}, 0
    for index, (prompt, mixture, max_tokens, pause, cancel_after) in enumerate(plan):
        requests.append(request(f"r{index}", prompt, mixture, max_tokens=max_tokens))
        system.submit(requests[-1])
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
    for given_request in requests:
        check_against_reference(system, kind, given_request)


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_are_clear_in_99_of_100_sequences(kind):
    """Without this the margin rule above could excuse everything."""
    rng = random.Random(7)
    system = System(kind, max_batch_size=8)
    combinations = [(prompt, mixture) for prompt in PROMPTS for mixture in MIXTURES]
    rng.shuffle(combinations)
    requests = [
        request(f"r{index}", prompt, mixture, max_tokens=16) for index, (prompt, mixture) in enumerate(combinations * 2)
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


def test_the_mixtures_of_the_tests_matter():
    """Each mixture gives other tokens than the base: an engine that ignored mixtures would fail above."""
    for mixture in MIXTURES[1:]:
        answers = [(reference("zephyra", p, mixture, 12), reference("zephyra", p, MIXTURES[0], 12)) for p in PROMPTS]
        assert any(mixed.token_ids != plain.token_ids for mixed, plain in answers)
