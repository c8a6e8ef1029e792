"""The optimizer: a resumed run goes on as if it had never stopped; the schedule is what it says."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.errors import InvalidInput
from cluster.training.optimization import Optimizer, Training, load_checkpoint, save_checkpoint, wsd

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


def _guarded(
    model: nn.Module, training: Training, last: int, broken: dict[int, list[str]], keep_at: int | None = None
) -> list[str]:
    """Train up to a step; `broken` says, once for each time, what of a step is no number. Returns what was said."""
    said = []
    while training.num_steps < last:
        step = training.num_steps
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        fault = broken[step].pop() if broken.get(step) else None
        if fault == "gradient":
            next(iter(model.parameters())).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        went_back = training.step(math.nan if fault == "loss" else float(loss.detach()))
        said += [went_back] if went_back is not None else []
        if went_back is None and training.num_steps == keep_at:
            training.keep()
    return said


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_loss_that_is_no_number_goes_back_and_on_at_half_the_rate(tmp_path: Path, fault: str) -> None:
    model = _model()
    training = Training("law", _optimizer(model))
    said = _guarded(model, training, NUM_STEPS, {5: [fault]}, keep_at=3)
    assert said == ["law: the loss of step 6 is no finite number; back to step 3, at 1/2 of the rate"]
    # Written out: three steps, and then the rest as somebody would who had halved the rate there.
    expected = _model()
    optimizer = _optimizer(expected)
    _train(expected, optimizer, 0, 3)
    halved = Optimizer(dict(expected.named_parameters()), 0.025, NUM_STEPS, weight_decay=0.1)
    halved.load_tensors(optimizer.tensors())
    _train(expected, halved, 3, NUM_STEPS)
    assert all(torch.equal(p, expected.state_dict()[name]) for name, p in model.state_dict().items())
    # And its rate is in the checkpoint.
    half, resumed = _model(), _model()
    broken = Training("law", _optimizer(half))
    _guarded(half, broken, 7, {5: [fault]}, keep_at=3)
    broken.keep()
    save_checkpoint(tmp_path, 7, broken.tensors("law:"))
    goes_on = Training("law", _optimizer(resumed))
    goes_on.load_tensors(load_checkpoint(tmp_path)[1], "law:")
    assert (goes_on.num_steps, goes_on.loss) == (7, broken.loss)
    _guarded(resumed, goes_on, NUM_STEPS, {})
    assert all(torch.equal(p, expected.state_dict()[name]) for name, p in resumed.state_dict().items())


def test_what_stays_no_number_ends_with_a_sentence() -> None:
    model = _model()
    training = Training("law", _optimizer(model))
    with pytest.raises(InvalidInput, match=r"loss of law is no finite number at step 3, even at an eighth.*lower"):
        _guarded(model, training, NUM_STEPS, {2: ["loss"] * 4})


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
