"""The engine on a GPU, where there is one: exact in fp32 against the CPU's merged models, close in bf16."""

import pytest
import torch

from tests.engine.systems import KINDS, MIXTURES, PROMPTS, System, reference, request, teacher_forced

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FP32_TOLERANCE = 1e-3
"""Of logits around 1; sums in another order than on the CPU."""
BF16_TOLERANCE = 0.1
"""Norm of the difference over the norm, of teacher-forced logits."""


def play(kind: str, dtype: torch.dtype) -> System:
    system = System(kind, "torch", num_blocks=40, dtype=dtype, device="cuda", max_batch_size=4, max_step_tokens=20)
    for index, mixture in enumerate(MIXTURES):
        system.submit(request(f"r{index}", PROMPTS[index % len(PROMPTS)], mixture, max_tokens=12))
        system.deliver()
        system.step()
    system.run()
    return system


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_on_a_gpu_are_those_of_merged_weights(kind):
    system = play(kind, torch.float32)
    for index, mixture in enumerate(MIXTURES):
        seen, prompt = system.observed[f"r{index}"], PROMPTS[index % len(PROMPTS)]
        logits_TV = torch.stack(system.runner.logits[f"r{index}"]).cpu()
        forced_TV = teacher_forced(kind, prompt, mixture, seen.token_ids)
        assert (logits_TV - forced_TV).abs().max() < FP32_TOLERANCE
        certain = reference(kind, prompt, mixture, 12).num_certain()
        assert seen.token_ids[:certain] == reference(kind, prompt, mixture, 12).token_ids[:certain]


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_on_a_gpu_differs_by_rounding_only(kind):
    system = play(kind, torch.bfloat16)
    for index, mixture in enumerate(MIXTURES):
        seen, prompt = system.observed[f"r{index}"], PROMPTS[index % len(PROMPTS)]
        logits_TV = torch.stack(system.runner.logits[f"r{index}"]).cpu()
        forced_TV = teacher_forced(kind, prompt, mixture, seen.token_ids)
        assert (logits_TV - forced_TV).norm() < BF16_TOLERANCE * forced_TV.norm()
