"""The optimizer: a resumed run goes on as if it had never stopped; the schedule is what it says."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.training.optimization import Optimizer, load_checkpoint, save_checkpoint, wsd

NUM_STEPS = 12


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.RMSNorm(7), nn.Linear(7, 3))


def _train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step(step)


def _optimizer(model: nn.Module) -> Optimizer:
    return Optimizer(dict(model.named_parameters()), 0.05, NUM_STEPS, weight_decay=0.1)


@pytest.mark.parametrize("stop", [1, 6, 11])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = _model()
    _train(whole, _optimizer(whole), 0, NUM_STEPS)
    first = _model()
    optimizer = _optimizer(first)
    _train(first, optimizer, 0, stop)
    save_checkpoint(tmp_path, stop, optimizer.tensors("some prefix:"))
    second = _model()
    resumed = _optimizer(second)
    done, tensors = load_checkpoint(tmp_path)
    assert done == stop
    resumed.load_tensors(tensors, "some prefix:")
    _train(second, resumed, stop, NUM_STEPS)
    for name, parameter in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], parameter), name
    assert not torch.equal(second.state_dict()["0.weight"], _model().state_dict()["0.weight"])


def test_it_is_adamw_with_clipping_and_decay_of_matrices_alone() -> None:
    ours, theirs = _model(), _model()
    optimizer = _optimizer(ours)
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    others = [p for p in theirs.parameters() if p.dim() != 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.05,
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(NUM_STEPS):
        for model in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            # Large losses: every gradient is clipped.
            nn.functional.mse_loss(model(torch.randn(8, 5, generator=generator)), torch.full((8, 3), 9.0)).backward()
        optimizer.step(step)
        norm = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
        assert norm > 1
        for parameter in theirs.parameters():
            if parameter.grad is not None:
                parameter.grad /= norm
        for group in reference.param_groups:
            group["lr"] = 0.05 * wsd(step, NUM_STEPS)
        reference.step()
        reference.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 100, 1400])
def test_the_rate_rises_stays_and_falls(num_steps: int) -> None:
    rates = [wsd(step, num_steps) for step in range(num_steps)]
    assert all(0.01 <= rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if num_steps >= 100:
        warmup, decay = round(0.03 * num_steps), round(0.3 * num_steps)
        assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
        assert rates[warmup : num_steps - decay] == [1.0] * (num_steps - decay - warmup)
        assert rates[-1] == pytest.approx(max(0.01, 1 / decay))
