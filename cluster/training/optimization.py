"""Optimizer steps, what is done where one fails, and the state that a checkpoint must hold. Knows nothing of what is
trained. Parameters in bfloat16 are the rounded copies of wide ones, which are what steps change: a step is often too
small to be seen in eight bits (Micikevicius et al. 2018, arXiv 1710.03740).

AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) under a warm-up, stable, decay schedule (WSD: Hu et al. 2024,
arXiv 2404.06395).
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cluster.errors import InvalidInput
from cluster.training.sharding import spread_like, whole

_RECENT_STEPS = 8
"""Steps whose mean loss says whether something is learned."""
_MAX_ROLLBACKS = 3


def wsd(step: int, num_steps: int, warmup_share: float = 0.03, decay_share: float = 0.3) -> float:
    """Share of the peak learning rate at `step`: rises linearly, stays, falls linearly to a hundredth."""
    warmup, decay = max(1, round(num_steps * warmup_share)), max(1, round(num_steps * decay_share))
    return min(1.0, (step + 1) / warmup, max(0.01, (num_steps - step) / decay))


class Optimizer:
    """AdamW over named parameters, with gradients clipped to a norm of 1."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        learning_rate: float,
        num_steps: int,
        weight_decay: float = 0.0,
        keep_gradients: bool = False,
    ) -> None:
        """With `keep_gradients` a step sets them to zero instead of taking them away: others hold views of them."""
        self._given = dict(parameters)
        self._parameters = {name: _wide(parameter) for name, parameter in parameters.items()}
        self._learning_rate, self._num_steps = learning_rate, num_steps
        self._keep_gradients = keep_gradients
        matrices = [p for p in self._parameters.values() if p.dim() >= 2]
        others = [p for p in self._parameters.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=learning_rate, betas=(0.9, 0.95), fused=True
        )

    def step(self, step: int, rate_factor: float = 1.0) -> bool:
        """Apply the gradients that lie on the parameters as step `step` of the schedule, and clear them.

        False where they are not finite: then they are only cleared.
        """
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * rate_factor * wsd(step, self._num_steps)
        self.gather()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), 1.0, foreach=True)
        is_finite = bool(torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        if is_finite:
            self._adamw.step()
            self._round()
        self.clear()
        return is_finite

    def gather(self) -> None:
        """Add the gradients of parameters in bfloat16 to those of the wide ones: of many, most would be lost there."""
        for given, wide in self._rounded():
            if given.grad is not None:
                gradient = given.grad.to(wide.dtype)
                wide.grad = gradient if wide.grad is None else wide.grad.add_(gradient)
                given.grad = None

    def gradients(self) -> list[Tensor]:
        """Those that lie on the parameters, wide ones where there are such."""
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]

    def clear(self) -> None:
        """Drop the gradients that lie on the parameters."""
        self._adamw.zero_grad(set_to_none=not self._keep_gradients)
        for given, _ in self._rounded():
            given.grad = None

    def widen(self) -> None:
        """Training is over: parameters in bfloat16 become the wide ones that they were the copies of."""
        for given, wide in self._rounded():
            given.data = wide.detach()
        self._given = self._parameters

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and moments by name: all that a resumed run needs beside the number of the step.

        In pieces on the workers where the parameters are.
        """
        out = {}
        for name, parameter in self._parameters.items():
            out[f"{prefix}{name}"] = parameter.detach().clone()
            for key, value in self._adamw.state.get(parameter, {}).items():
                out[f"{prefix}{name}|{key}"] = value.clone()
        return out

    def load_tensors(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """The inverse of `tensors`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(spread_like(tensors[f"{prefix}{name}"], parameter))
                start = f"{prefix}{name}|"
                # Copies, since the optimizer changes them in place.
                self._adamw.state[parameter] = {
                    key.removeprefix(start): spread_like(value.to(parameter.device, copy=True), parameter)
                    for key, value in tensors.items()
                    if key.startswith(start)
                }
        self._round()

    def _rounded(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The parameters in bfloat16, each with the wide one that it is the copy of."""
        pairs = ((given, self._parameters[name]) for name, given in self._given.items())
        return [(given, wide) for given, wide in pairs if given is not wide]

    @torch.no_grad()
    def _round(self) -> None:
        for given, wide in self._rounded():
            given.copy_(wide)


def _wide(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float()) if parameter.dtype == torch.bfloat16 else parameter


class Training:
    """The steps of one optimizer so far. A loss or gradient that is no finite number takes it back to where it was kept
    last, at half the rate.
    """

    def __init__(self, name: str, optimizer: Optimizer) -> None:
        """`name`: what people are told is trained."""
        self.name, self._optimizer = name, optimizer
        self.num_steps = 0
        self._num_rollbacks = 0
        self._recent = torch.full((_RECENT_STEPS,), math.inf, dtype=torch.float64)
        self.keep()

    @property
    def loss(self) -> float:
        """Mean of the last eight losses, or of as many as there are; not a number before the first."""
        return float(self._recent[torch.isfinite(self._recent)].mean())

    def is_learned(self, loss: float) -> bool:
        """Whether the mean of the last eight losses lies below this one."""
        return float(self._recent.mean()) < loss

    def step(self, loss: float) -> str | None:
        """Apply the gradients of a batch of this mean loss; or go back, and return the sentence that says so.

        Raises `InvalidInput` the fourth time.
        """
        if math.isfinite(loss) and self._optimizer.step(self.num_steps, 0.5**self._num_rollbacks):
            self._recent[self.num_steps % _RECENT_STEPS] = loss
            self.num_steps += 1
            return None
        return self._roll_back()

    def keep(self) -> None:
        """Here a step that fails goes back to."""
        self._kept = self._state()

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All that a resumed run needs, in one piece: what was kept last is what it goes on from."""
        return {f"{prefix}{name}": value for name, value in whole(self._kept).items()}

    def load_tensors(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """The inverse of `tensors`."""
        self._load({name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)})
        self.keep()

    def _roll_back(self) -> str:
        failed, num_rollbacks = self.num_steps, self._num_rollbacks + 1
        if num_rollbacks > _MAX_ROLLBACKS:
            raise InvalidInput(
                f"The loss of {self.name} is no finite number at step {failed + 1}, even at an eighth of the rate; "
                "give it a lower learning_rate, or look for broken rows in its data."
            )
        self._optimizer.clear()
        self._load(self._kept)
        self._num_rollbacks = num_rollbacks
        self._kept["|num_rollbacks"] = torch.tensor(num_rollbacks)
        return (
            f"{self.name}: the loss of step {failed + 1} is no finite number; back to step {self.num_steps}, "
            f"at 1/{2**num_rollbacks} of the rate"
        )

    def _state(self) -> dict[str, Tensor]:
        return {
            **self._optimizer.tensors(),
            "|recent": self._recent.clone(),
            "|num_steps": torch.tensor(self.num_steps),
            "|num_rollbacks": torch.tensor(self._num_rollbacks),
        }

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self._optimizer.load_tensors(state)
        self._recent = state["|recent"].clone()
        self.num_steps, self._num_rollbacks = int(state["|num_steps"]), int(state["|num_rollbacks"])


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], rank: int = 0) -> None:
    """Write a checkpoint, or one worker's part of it: safetensors, nothing pickled."""
    save_file({**tensors, "_step": torch.tensor(step)}, folder / f"checkpoint-{rank}.safetensors")


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """The number of steps done, and the tensors of all parts: another number of workers may go on from them."""
    tensors = {
        name: value for file in folder.glob("checkpoint-*.safetensors") for name, value in load_file(file).items()
    }
    return int(tensors.pop("_step")), tensors
