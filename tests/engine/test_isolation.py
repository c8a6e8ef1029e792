"""One sequence cannot reach another: bits stay the same whatever the others' mixtures are, overflow included."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.serving import EngineSettings
from cluster.engine.detokenizer import Detokenizer
from cluster.engine.scheduler import Chunk
from cluster.engine.sequence import Sequence
from cluster.lora.weights import AdapterWeights, Factors
from cluster.messages import FinishReason, GenerateRequest, Mixture, SamplingParams
from cluster.model.base import encode_prompt
from tests.engine.systems import (
    KINDS,
    MIXTURES,
    PROMPTS,
    RUNNERS,
    System,
    adapters,
    emptied,
    make_base,
    make_runner,
    ref,
    reference,
    request,
    tokenizer,
)

HUGE = Mixture.of({ref("huge"): 1.0})


def huge_adapter(value: float) -> AdapterWeights:
    """Finite factors, `value` in every place, whose products with each other (1e30) or any input (3e38) are not."""
    law = adapters()[ref("law")]
    return AdapterWeights(
        {
            n: Factors(torch.full_like(f.a_RI, value), torch.full_like(f.b_OR, value), 1.0)
            for n, f in law.factors.items()
        },
        law.base_fingerprint,
    )


def run_in_lockstep(kind: str, runner: str, requests: list[GenerateRequest]) -> System:
    """All adapters resident from the start, one more request before each step: the schedule depends on nothing else."""
    system = System(kind, runner, max_batch_size=8, reuse_prefixes=False)
    for adapter_ref, weights in system.adapters.items():
        system.engine.add_adapter(adapter_ref, weights)
    for given_request in requests:
        system.submit(given_request)
        system.step()
    system.run()
    return system


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=6)
@given(plan=st.lists(st.tuples(st.sampled_from(PROMPTS), st.sampled_from(MIXTURES)), min_size=1, max_size=5))
def test_a_base_row_is_bit_identical_with_the_other_mixtures_emptied(kind, runner, plan):
    base_row = request("base", PROMPTS[3], max_tokens=10, ignore_eos=True)
    others = [
        request(f"r{index}", prompt, mixture, max_tokens=8, ignore_eos=True)
        for index, (prompt, mixture) in enumerate(plan)
    ]
    mixed = run_in_lockstep(kind, runner, [base_row, *others])
    plain = run_in_lockstep(kind, runner, [base_row, *map(emptied, others)])
    assert torch.equal(torch.stack(mixed.runner.logits["base"]), torch.stack(plain.runner.logits["base"]))
    assert mixed.observed["base"].token_ids == plain.observed["base"].token_ids


def sequence_of(prompt: str, mixture: Mixture, blocks: list[int]) -> Sequence:
    sequence = Sequence(
        request_id=prompt,
        prompt_ids=encode_prompt(tokenizer(), prompt),
        mixture=mixture,
        sampling=SamplingParams(),
        seed=0,
        detokenizer=Detokenizer(tokenizer()),
    )
    sequence.blocks = blocks
    return sequence


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("value", [1e30, 3e38])
def test_overflow_in_a_step_leaves_the_other_rows_as_they_were(value, runner):
    weights = {**adapters(), ref("huge"): huge_adapter(value)}
    logits_by_mixture = []
    for third_mixture in (Mixture(), HUGE):
        made = make_runner(runner, make_base(), EngineSettings(max_batch_size=4))
        resident = {adapter_ref: made.prepare(adapter) for adapter_ref, adapter in weights.items()}
        sequences = [
            sequence_of(PROMPTS[0], MIXTURES[0], [3, 1]),
            sequence_of(PROMPTS[2], MIXTURES[5], [0, 4, 8]),
            sequence_of(PROMPTS[4], third_mixture, [2, 5, 6, 7]),
        ]
        steps = []
        for _ in range(5):  # the prompts, then single tokens
            chunks = [Chunk(s, s.num_tokens - s.num_computed) for s in sequences]
            steps.append(made.run(chunks, resident))
            for sequence in sequences:
                sequence.num_computed = sequence.num_tokens
                sequence.generated_ids.append(7)
        logits_by_mixture.append(torch.stack(steps))
    without, with_huge = logits_by_mixture
    assert not torch.isfinite(with_huge[:, 2]).any()
    assert torch.equal(with_huge[:, :2], without[:, :2])


@pytest.mark.parametrize("value", [1e30, 3e38])
def test_a_sequence_that_overflows_ends_and_its_row_serves_the_next(value):
    system = System("zephyra", max_batch_size=2)
    system.adapters[ref("huge")] = huge_adapter(value)
    system.submit(request("long", PROMPTS[1], MIXTURES[1], max_tokens=20))
    system.submit(request("bad", PROMPTS[4], HUGE, max_tokens=20))
    system.submit(request("next", PROMPTS[0], MIXTURES[2], max_tokens=12))
    seen = system.run()
    assert (seen["bad"].finish_reason, seen["bad"].token_ids) == (FinishReason.ERROR, [])
    for request_id, prompt, mixture, max_tokens in (
        ("long", PROMPTS[1], MIXTURES[1], 20),
        ("next", PROMPTS[0], MIXTURES[2], 12),
    ):
        expected = reference("zephyra", prompt, mixture, max_tokens)
        assert expected.num_certain() == len(expected.token_ids)
        assert seen[request_id].token_ids == expected.token_ids


@pytest.mark.parametrize("weight", [1e300, 1e38])
def test_a_weight_beyond_float32_is_its_own_sequences_error_only(weight):
    system = System("zephyra", max_batch_size=2)
    system.submit(request("bad", PROMPTS[0], Mixture.of({ref("law"): weight})))
    system.submit(request("good", PROMPTS[0], MIXTURES[1]))
    seen = system.run()
    assert seen["bad"].finish_reason is FinishReason.ERROR
    assert seen["good"].token_ids == reference("zephyra", PROMPTS[0], MIXTURES[1], 8).token_ids


def test_a_nan_in_the_base_ends_sequences_without_bringing_down_the_engine():
    system = System("zephyra", "torch")
    system.submit(request("before"))
    system.run()
    norm = system.base.model.model.norm.weight
    whole = copy.deepcopy(norm.data)
    norm.data.fill_(math.nan)
    system.submit(request("broken"))
    system.run()
    norm.data.copy_(whole)
    system.submit(request("after"))
    seen = system.run()
    assert seen["broken"].finish_reason is FinishReason.ERROR
    assert seen["after"].token_ids == seen["before"].token_ids
