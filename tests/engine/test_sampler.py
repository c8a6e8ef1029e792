"""The sampler against transformers' own processors, and its draws against the distribution they come from."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.engine.sampler import Draw, Sampled, adjusted, candidates, sample, uniform
from cluster.errors import InvalidInput
from cluster.messages import FinishReason, SamplingParams
from tests.engine.systems import MIXTURES, PROMPTS, System, request

NO_IDS = torch.zeros(1, 1, dtype=torch.long)


def probabilities(logits_V, sampling):
    """Of all tokens [V]."""
    ids_C, shares_C = candidates(logits_V, sampling)
    return torch.zeros(len(logits_V), dtype=torch.float64).index_put((ids_C,), shares_C)


def tokens_of(sampled):
    return [None if given is None else given.token_id for given in sampled]


def assert_same_distribution(given_V, expected_V, logits_V):
    """Equal but for which tokens of a tie at the edge of top-p are kept, which transformers leaves to its sort."""
    order = sorted(range(len(logits_V)), key=lambda token: (float(logits_V[token]), float(given_V[token])))
    expected_order = sorted(range(len(logits_V)), key=lambda token: (float(logits_V[token]), float(expected_V[token])))
    torch.testing.assert_close(given_V[order], expected_V[expected_order], rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 60),
    temperature=st.floats(0.05, 10),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1.0) | st.sampled_from([1e-300, 0.25, 0.5, 0.75]),
    min_p=st.just(0.0) | st.floats(0.0, 1.0),
    rounded=st.booleans(),
)
@example(seed=0, vocab_size=1, temperature=1.0, top_k=0, top_p=1e-300, min_p=0.0, rounded=False)
@example(seed=0, vocab_size=9, temperature=1.0, top_k=0, top_p=1e-300, min_p=1.0, rounded=False)
def test_the_distribution_is_that_of_transformers_warpers(seed, vocab_size, temperature, top_k, top_p, min_p, rounded):
    logits_BV = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(seed)).double() * 3
    if rounded:  # ties
        logits_BV = logits_BV.round()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected_V = warpers(NO_IDS, logits_BV.clone())[0].softmax(dim=-1)
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_same_distribution(probabilities(logits_BV[0], sampling), expected_V, logits_BV[0])


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("shape", ["narrow", "wide", "flat", "steps", "zipf"])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_transformers(shape, top_p):
    """Large enough that its tail is not sorted."""
    vocab_size = 20_000
    noise_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)).double()
    logits_V = {
        "narrow": noise_V * 4,
        "wide": noise_V * 0.5,
        "flat": torch.zeros(vocab_size).double(),
        "steps": (noise_V * 2).round(),
        "zipf": -1.2 * torch.arange(1, vocab_size + 1).double().log(),
    }[shape]
    expected_V = TopPLogitsWarper(top_p)(NO_IDS, logits_V[None].clone())[0].softmax(dim=-1)
    given_V = probabilities(logits_V, SamplingParams(temperature=1.0, top_p=top_p))
    num_kept, num_expected = int((given_V > 0).sum()), int((expected_V > 0).sum())
    if shape in ("flat", "steps"):
        # The sums of equal shares reach the edge within a rounding error, so that one token may fall either way.
        assert abs(num_kept - num_expected) <= 1
        assert logits_V[given_V > 0].min() == logits_V[expected_V > 0].min()
    else:
        torch.testing.assert_close(given_V, expected_V, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("vocab_size", "top_p"), [(2, 0.5), (4, 0.25), (4, 0.75), (8, 0.5)])
def test_a_sum_that_is_exactly_top_p_is_enough(vocab_size, top_p):
    """As in transformers, whose `<=` decides it; equal logits make the sums exact."""
    logits_BV = torch.zeros(1, vocab_size, dtype=torch.float64)
    expected_BV = TopPLogitsWarper(top_p)(NO_IDS, logits_BV.clone()).softmax(dim=-1)
    kept_V = probabilities(logits_BV[0], SamplingParams(temperature=1.0, top_p=top_p))
    assert torch.equal(kept_V.sort().values, expected_BV[0].sort().values)
    assert int((kept_V > 0).sum()) == vocab_size * top_p


IDS = st.lists(st.integers(0, 29), max_size=12)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    prompt_ids=IDS.filter(bool),
    generated_ids=IDS,
    bias=st.dictionaries(st.integers(0, 29), st.floats(-100, 100), max_size=5),
    repetition=st.just(1.0) | st.floats(0.01, 100),
    presence=st.just(0.0) | st.floats(-2, 2),
    frequency=st.just(0.0) | st.floats(-2, 2),
)
def test_bias_and_penalties_are_those_of_transformers_and_openai(
    seed, prompt_ids, generated_ids, bias, repetition, presence, frequency
):
    """transformers for the repetition penalty; OpenAI's formula, token by token, for the others."""
    logits_V = torch.randn(30, generator=torch.Generator().manual_seed(seed)) * 5
    before_V = logits_V.clone()
    expected_V = logits_V.double()
    for token, value in bias.items():
        expected_V[token] += value
    ids = torch.tensor([prompt_ids + generated_ids])
    expected_V = RepetitionPenaltyLogitsProcessor(repetition)(ids, expected_V[None].clone())[0]
    for token, count in Counter(generated_ids).items():
        expected_V[token] -= count * frequency + float(count > 0) * presence
    sampling = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(bias.items()),
    )
    draw = Draw(sampling, 0, 0, prompt_ids, generated_ids)
    torch.testing.assert_close(adjusted(logits_V, draw), expected_V, rtol=1e-12, atol=1e-12)
    # The row is the caller's, also one that is float64 already.
    assert torch.equal(logits_V, before_V)
    doubled_V = before_V.double()
    adjusted(doubled_V, draw)
    assert torch.equal(doubled_V, before_V.double())
    assert tokens_of(sample(logits_V[None], [draw])) == [int(expected_V.argmax())]


def test_a_penalised_row_is_drawn_from_its_adjusted_distribution():
    logits_V = torch.tensor([5.0, 4.0, 3.0, -9.0])
    sampling = SamplingParams(temperature=0.5, top_k=2, logit_bias=((0, -100.0),), presence_penalty=2.0)
    draws = [Draw(sampling, seed, 3, [0], [1]) for seed in range(400)]
    # Bias takes token 0 away, the penalty takes token 1 from 4 to 2: likeliest are 2 (3.0) and 1 (2.0).
    counts = Counter(tokens_of(sample(logits_V.expand(400, -1), draws)))
    assert set(counts) == {1, 2}
    expected = 400 * float(torch.tensor([2.0, 4.0, 6.0])[1:].softmax(0)[0])
    assert abs(counts[1] - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.1),
    ],
)
def test_draws_follow_the_distribution(sampling):
    """Pearson's chi-square over 20,000 draws at consecutive positions."""
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    num_draws = 20_000
    draws = [Draw(sampling, seed=11, position=position) for position in range(num_draws)]
    tokens = torch.tensor(tokens_of(sample(logits_V.expand(num_draws, -1), draws)))
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
    assert tokens_of(sample(logits_BV, draws)) == [1, None, None, None, 0]


@settings(deadline=None, max_examples=60)
@given(
    vocab_size=st.integers(1, 1500),
    place=st.integers(0, 1499),
    value=st.sampled_from([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38]),
    scale=st.sampled_from([1.0, 1e38]),
    seed=st.integers(0, 2**32),
)
def test_only_rows_with_nan_or_infinity_give_nothing_and_the_likeliest_is_found(vocab_size, place, value, scale, seed):
    logits_BV = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) * scale
    logits_BV[1, place % vocab_size] = value
    expected = [int(row.argmax()) for row in logits_BV]
    if not math.isfinite(value):
        expected[1] = None
    greedy = Draw(SamplingParams(), seed=0, position=0)
    assert tokens_of(sample(logits_BV, [greedy] * 3)) == expected


def test_of_equal_logits_the_first_is_the_likeliest():
    logits_BV = torch.zeros(2, 1024)
    logits_BV[1, [300, 310, 900]] = 1.0
    assert tokens_of(sample(logits_BV, [Draw(SamplingParams(), 0, 0)] * 2)) == [0, 300]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 40),
    counts=st.lists(st.none() | st.integers(0, 20), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 0.7]),
    scale=st.sampled_from([3.0, 1e37]),
)
def test_logprobs_are_those_of_the_model_before_anything_was_made_of_them(seed, vocab_size, counts, temperature, scale):
    logits_BV = torch.randn(len(counts), vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    expected_BV = logits_BV.double().log_softmax(dim=-1)
    shaped = {"temperature": temperature, "presence_penalty": 2.0, "logit_bias": ((0, 50.0),), "top_k": 3}
    draws = [Draw(SamplingParams(logprobs=count, **shaped), row, 5, [0], [0]) for row, count in enumerate(counts)]
    without = [Draw(SamplingParams(**shaped), row, 5, [0], [0]) for row in range(len(counts))]
    seen = sample(logits_BV, draws)
    assert tokens_of(seen) == tokens_of(sample(logits_BV, without))
    for row, (one, count) in enumerate(zip(seen, counts, strict=True)):
        if count is None:
            assert one == Sampled(one.token_id)
            continue
        close = {"rel": 1e-5, "abs": 1e-5}
        assert one.logprob == pytest.approx(float(expected_BV[row, one.token_id]), **close)
        assert one.logprob <= 0
        best = expected_BV[row].topk(min(count, vocab_size))
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), **close)


def test_rows_that_hold_no_numbers_have_no_logprobs():
    logits_BV = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    seen = sample(logits_BV, [Draw(SamplingParams(logprobs=2), 0, 0)] * 2)
    assert seen[1] is None
    assert [token for token, _ in seen[0].top] == [1, 0]


@pytest.mark.parametrize("temperature", [1e-320, 1e-12])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits_BV = torch.tensor([[0.5, 1.0, 0.999]])
    draw = Draw(SamplingParams(temperature=temperature), seed=0, position=0)
    assert tokens_of(sample(logits_BV, [draw])) == [1]


def spun_out(sampling, seed, prompt_ids, generated_ids, num_tokens, others=()):
    """Generate on from `generated_ids` with a model whose logits follow from the last token; `others` are batched."""
    table_VV = torch.randn(50, 50, generator=torch.Generator().manual_seed(9)) * 2
    generated_ids = list(generated_ids)
    while len(generated_ids) < num_tokens:
        logits_V = table_VV[[*prompt_ids, *generated_ids][-1]]
        draw = Draw(sampling, seed, len(prompt_ids) + len(generated_ids), prompt_ids, list(generated_ids))
        rows = [table_VV[7]] * len(others) + [logits_V]
        generated_ids.append(sample(torch.stack(rows), [*others, draw])[-1].token_id)
    return generated_ids


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
        SamplingParams(temperature=0.9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.7),
        SamplingParams(repetition_penalty=1.5, logit_bias=((3, 2.0), (4, -5.0)), logprobs=2),
    ],
)
def test_a_sequence_goes_on_elsewhere_as_it_would_have(sampling):
    whole = spun_out(sampling, 17, [1, 2, 3], [], 40)
    others = [Draw(SamplingParams(temperature=1.0), 5, 9), Draw(SamplingParams(logprobs=3), 5, 9)]
    for cut in (1, 13, 39):
        assert spun_out(sampling, 17, [1, 2, 3], whole[:cut], 40) == whole
        assert spun_out(sampling, 17, [1, 2, 3], whole[:cut], 40, others) == whole
    if sampling.temperature:
        assert spun_out(sampling, 18, [1, 2, 3], [], 40) != whole


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


def test_the_engine_reports_a_logprob_per_token_and_stops_where_it_is_told():
    system = System()
    system.submit(request("plain", max_tokens=12))
    expected = system.run()["plain"].token_ids
    system = System()
    system.submit(request("told", max_tokens=12, logprobs=2))
    reports = []
    while system.engine.has_work:
        reports += [(output.chunk.token_ids, output.chunk.logprobs) for output in system.step()]
    assert [token for token_ids, _ in reports for token in token_ids] == expected
    for token_ids, logprobs in reports:
        assert tuple(report.token_id for report in logprobs) == token_ids
        # Greedy: what was taken is the likeliest.
        assert all(report.top[0].token_id == report.token_id for report in logprobs)
        assert all(report.top[0].logprob == report.logprob for report in logprobs)
    end = expected[len(expected) // 2]
    system.submit(request("stopped", max_tokens=12, stop_token_ids=(end,)))
    stopped = system.run()["stopped"]
    assert stopped.token_ids == expected[: expected.index(end) + 1]
    assert stopped.finish_reason is FinishReason.STOP


def test_an_end_that_is_ignored_ends_nothing():
    end = System().base.tokenizer.eos_token_id
    forced = {"logit_bias": ((end, 100.0),), "max_tokens": 9}
    system = System()
    system.submit(request("ends", **forced))
    system.submit(request("goes on", ignore_eos=True, **forced))
    seen = system.run()
    assert (seen["ends"].token_ids, seen["ends"].finish_reason) == ([end], FinishReason.STOP)
    assert (seen["goes on"].token_ids, seen["goes on"].finish_reason) == ([end] * 9, FinishReason.LENGTH)


def test_a_token_that_the_model_does_not_have_is_refused():
    system = System()
    for named in ({"logit_bias": ((10**6, 1.0),)}, {"stop_token_ids": (10**6,)}):
        with pytest.raises(InvalidInput, match=f"{next(iter(named))} names token 1000000; the model's tokens are 0 to"):
            system.submit(request("r", **named))
