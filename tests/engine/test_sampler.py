"""The sampler against transformers' own warpers, and its draws against the distribution they come from."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.engine.sampler import Draw, probabilities, sample, uniform
from cluster.messages import SamplingParams
from tests.engine.systems import MIXTURES, PROMPTS, System, request


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 60),
    temperature=st.floats(0.05, 10),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1.0) | st.sampled_from([1e-300, 0.25, 0.5, 0.75]),
    rounded=st.booleans(),
)
@example(seed=0, vocab_size=1, temperature=1.0, top_k=0, top_p=1e-300, rounded=False)
@example(seed=0, vocab_size=9, temperature=1.0, top_k=0, top_p=1e-300, rounded=False)
def test_the_distribution_is_that_of_transformers_warpers(seed, vocab_size, temperature, top_k, top_p, rounded):
    logits_BV = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(seed)).double() * 3
    if rounded:  # ties
        logits_BV = logits_BV.round()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected_V = warpers(torch.zeros(1, 1, dtype=torch.long), logits_BV.clone())[0].softmax(dim=-1)
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(probabilities(logits_BV[0], sampling), expected_V, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("vocab_size", "top_p"), [(2, 0.5), (4, 0.25), (4, 0.75), (8, 0.5)])
def test_a_sum_that_is_exactly_top_p_is_enough(vocab_size, top_p):
    """As in transformers, whose `<=` decides it; equal logits make the sums exact."""
    logits_BV = torch.zeros(1, vocab_size, dtype=torch.float64)
    expected_BV = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), logits_BV.clone()).softmax(dim=-1)
    kept_V = probabilities(logits_BV[0], SamplingParams(temperature=1.0, top_p=top_p))
    assert torch.equal(kept_V, expected_BV[0])
    assert int((kept_V > 0).sum()) == vocab_size * top_p


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8),
    ],
)
def test_draws_follow_the_distribution(sampling):
    """Pearson's chi-square over 20,000 draws at consecutive positions."""
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    num_draws = 20_000
    draws = [Draw(sampling, seed=11, position=position) for position in range(num_draws)]
    tokens = torch.tensor(sample(logits_V.expand(num_draws, -1), draws))
    expected_V = probabilities(logits_V, sampling) * num_draws
    counts_V = torch.bincount(tokens, minlength=12).double()
    possible = expected_V > 0
    assert not counts_V[~possible].any(), "a token that was cut off was drawn"
    chi_square = ((counts_V - expected_V)[possible] ** 2 / expected_V[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom), (counts_V, expected_V)


def test_random_numbers_are_uniform_over_seeds_and_positions():
    by_position = torch.tensor([uniform(5, position) for position in range(10_000)])
    by_seed = torch.tensor([uniform(seed, 5) for seed in range(10_000)])
    for numbers in (by_position, by_seed):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = torch.histc(numbers, bins=20, min=0, max=1)
        assert ((counts - 500) ** 2 / 500).sum() < 19 + 4 * math.sqrt(38)


def test_greedy_takes_the_likeliest_and_rows_are_independent():
    logits_BV = torch.tensor(
        [[0.0, 3.0, 1.0], [2.0, math.nan, 0.0], [0.0, 1.0, math.inf], [5.0, -math.inf, 0.0], [9, 0, 0]]
    )
    draws = [Draw(SamplingParams(temperature=t), seed=1, position=9) for t in (0, 0, 1.0, 1.0, 0)]
    assert sample(logits_BV, draws) == [1, None, None, None, 0]


@pytest.mark.parametrize("temperature", [1e-320, 1e-12])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits_BV = torch.tensor([[0.5, 1.0, 0.999]])
    assert sample(logits_BV, [Draw(SamplingParams(temperature=temperature), seed=0, position=0)]) == [1]


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch():
    sampled = request("s", PROMPTS[1], MIXTURES[5], max_tokens=20, temperature=1.0, top_p=0.95, seed=42)
    alone, batched = System(), System(max_batch_size=3)
    alone.submit(sampled)
    for index, mixture in enumerate(MIXTURES[:4]):
        batched.submit(request(f"r{index}", PROMPTS[index], mixture, max_tokens=5 + 3 * index, temperature=0.9))
    batched.submit(sampled)
    assert alone.run()["s"].token_ids == batched.run()["s"].token_ids


def test_without_a_seed_answers_differ_and_with_another_seed_too():
    system = System(max_batch_size=6)
    for index in range(3):
        system.submit(request(f"free{index}", max_tokens=20, temperature=2.0))
        system.submit(request(f"seed{index}", max_tokens=20, temperature=2.0, seed=index))
    answers = {tuple(seen.token_ids) for seen in system.run().values()}
    assert len(answers) == 6
