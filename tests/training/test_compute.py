"""Other numbers and other devices: bfloat16 against float32, and a GPU against the CPU.

Where there is no GPU, torch's fake tensors say whether everything that meets lies on the same device.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.config.places import CHECKOUT
from cluster.config.training import AdapterSettings, BaseSettings, Recipe, StageSettings, TrainingDtype
from cluster.errors import InvalidInput
from cluster.lora.weights import AdapterWeights
from cluster.model.base import Base
from cluster.training.compute import device_of, multiplies_bfloat16, with_dtype
from cluster.training.documents import documents
from cluster.training.one_pass import FitSettings, fit_adapters, mean_losses
from cluster.training.optimization import Optimizer
from cluster.training.passes import arrange, token_losses
from cluster.training.stage_base import fit_base
from cluster.training.workers import Workers
from tests.model.nano import nano_model
from tests.training.rows import nano_tokenizer, some_examples
from tests.training.runs import FolderRun, Stopped

TOKENIZER = nano_tokenizer()
EXAMPLES = some_examples(TOKENIZER, 36)
ROWS = {"law": EXAMPLES[:20], "math": EXAMPLES[20:]}
ADAPTERS = AdapterSettings(rank=4, alpha=8, num_steps=12, tokens_per_batch=256, learning_rate=0.01)
BASE = BaseSettings(num_steps=12, tokens_per_batch=256, learning_rate=3e-3)
CUDA = torch.device("cuda:0")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def _model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    model: Any = nano_model(vocab_size=len(TOKENIZER))
    return nn.Module.to(model.requires_grad_(False), device, dtype)


def _base(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Base:
    return Base(_model(dtype, device), TOKENIZER, "0" * 16, "nano")


def _fit_base(run: FolderRun, dtype: torch.dtype) -> dict[str, Tensor]:
    model = _model().requires_grad_(True)
    fit_base(model, EXAMPLES, BASE, seed=3, every=5, run=run, dtype=dtype)
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


def _loss(weights: dict[str, Tensor]) -> float:
    model = _model()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    with torch.no_grad(), documents(model) as takes_lengths:
        (batch,) = arrange({"": EXAMPLES}, 10**9, learn_prompts=True)
        return float(token_losses(model, batch, takes_lengths).mean())


def _fit_adapters(run: FolderRun, dtype: torch.dtype) -> dict[str, AdapterWeights]:
    base = _base(dtype, str(run.workers.device))
    fitted = fit_adapters(base, ROWS, FitSettings(ADAPTERS, seed=3, checkpoint_every_steps=5), run)
    return {domain: one.weights for domain, one in fitted.items()}


def test_steps_on_bfloat16_are_those_of_adamw_on_wide_weights_with_the_same_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=generator).bfloat16()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = Optimizer({"w": ours}, learning_rate=1e-4, num_steps=40)
    reference = torch.optim.AdamW([theirs], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(8, 20):  # where the schedule is flat
        gradient = torch.randn(6, 5, generator=generator).bfloat16()
        ours.grad, theirs.grad = gradient.clone(), gradient.float()
        nn.utils.clip_grad_norm_([theirs], 1.0)
        assert optimizer.step(step)
        reference.step()
        assert torch.equal(ours.detach(), theirs.detach().bfloat16()), "the copy is the rounded wide one"
        assert ours.grad is None
    unmoved = (ours.detach() == start).float().mean()
    assert unmoved > 0.5, "steps were meant to be too small for most copies to move"
    optimizer.widen()
    assert ours.dtype == torch.float32
    assert (ours.detach() != start.float()).all()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-7)


def test_a_base_trained_in_bfloat16_is_nearly_the_one_trained_in_float32(tmp_path: Path) -> None:
    before = _loss(dict(_model().named_parameters()))
    wide = _fit_base(FolderRun(tmp_path / "wide"), torch.float32)
    narrow = _fit_base(FolderRun(tmp_path / "narrow"), torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in narrow.values())
    assert before - _loss(wide) > 1.0, "it was meant to learn"
    assert _loss(narrow) == pytest.approx(_loss(wide), rel=0.01)
    assert not all(torch.equal(wide[name], narrow[name]) for name in wide)


def test_in_bfloat16_a_killed_and_resumed_base_is_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    whole = _fit_base(FolderRun(tmp_path / "whole"), torch.bfloat16)
    with pytest.raises(Stopped):
        _fit_base(FolderRun(tmp_path / "broken", stop_after=5), torch.bfloat16)
    resumed = _fit_base(FolderRun(tmp_path / "broken"), torch.bfloat16)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_adapters_over_a_bfloat16_base_are_nearly_those_over_a_float32_one(tmp_path: Path) -> None:
    wide = _fit_adapters(FolderRun(tmp_path / "wide"), torch.float32)
    narrow = _fit_adapters(FolderRun(tmp_path / "narrow"), torch.bfloat16)
    plain, expected, given = (mean_losses(_base(), adapters, ROWS) for adapters in ({}, wide, narrow))
    for domain in ROWS:
        assert plain[domain] - expected[domain] > 0.5, "it was meant to learn"
        assert given[domain] == pytest.approx(expected[domain], rel=0.01)
        assert all(f.a_RI.dtype == f.b_OR.dtype == torch.float32 for f in narrow[domain].factors.values())


def test_auto_is_bfloat16_where_the_processor_says_that_it_multiplies_it(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    every: tuple[TrainingDtype, ...] = ("float32", "bfloat16", "auto")
    for wanted in every:
        settings = StageSettings(root=tmp_path, data=tmp_path, recipe=Recipe(dtype=wanted), name="test")
        chosen = with_dtype(settings, FolderRun(tmp_path / "run"))
        auto: TrainingDtype = "bfloat16" if multiplies_bfloat16(cpu) else "float32"
        assert chosen.recipe == Recipe(dtype=auto if wanted == "auto" else wanted)
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        pytest.skip("no /proc/cpuinfo here to compare with")
    flags = set(info.read_text().split())
    assert multiplies_bfloat16(cpu) == bool({"avx512_bf16", "amx_bf16"} & flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said() -> None:
    with pytest.raises(InvalidInput, match="this process sees no GPU; use cpu"):
        device_of("cuda")


def test_all_that_meets_on_another_device_lies_there() -> None:
    stages = "_a_base\n_adapters\n_a_soft_mixture\n"
    command = [sys.executable, "-m", "tests.training.elsewhere"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, stages), done.stderr[-2000:]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_trains_what_the_cpu_does(dtype: torch.dtype, tmp_path: Path) -> None:
    def run(name: str) -> FolderRun:
        return FolderRun(tmp_path / name, workers=Workers(device=CUDA if "gpu" in name else None))

    there, here = _fit_base(run("gpu base"), dtype), _fit_base(run("cpu base"), torch.float32)
    assert _loss(there) == pytest.approx(_loss(here), rel=0.01)
    over_there, over_here = _fit_adapters(run("gpu adapters"), dtype), _fit_adapters(run("adapters"), torch.float32)
    expected = mean_losses(_base(), over_here, ROWS)
    assert mean_losses(_base(), over_there, ROWS) == pytest.approx(expected, rel=0.01)
    with pytest.raises(Stopped):
        _fit_base(FolderRun(tmp_path / "broken", 5, Workers(device=CUDA)), dtype)
    resumed = _fit_base(FolderRun(tmp_path / "broken", workers=Workers(device=CUDA)), dtype)
    assert _loss(resumed) == pytest.approx(_loss(there), rel=1e-3)
