"""One optimizer step and the state that a checkpoint must hold. Knows nothing of what is trained.

AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) under a warm-up, stable, decay schedule (WSD: Hu et al. 2024,
arXiv 2404.06395).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


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
        self._parameters = dict(parameters)
        self._learning_rate, self._num_steps = learning_rate, num_steps
        self._keep_gradients = keep_gradients
        matrices = [p for p in self._parameters.values() if p.dim() >= 2]
        others = [p for p in self._parameters.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=learning_rate, betas=(0.9, 0.95), fused=True
        )

    def step(self, step: int) -> None:
        """Apply the gradients that lie on the parameters as step `step` of the schedule, and clear them."""
        rate = self._learning_rate * wsd(step, self._num_steps)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0, foreach=True)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=not self._keep_gradients)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and moments by name: all that a resumed run needs beside the number of the step."""
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
                parameter.copy_(tensors[f"{prefix}{name}"])
                start = f"{prefix}{name}|"
                state = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
                if state:
                    self._adamw.state[parameter] = state


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint: safetensors, nothing pickled."""
    save_file({**tensors, "_step": torch.tensor(step)}, folder / "checkpoint.safetensors")


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """The number of steps done, and the tensors."""
    tensors = load_file(folder / "checkpoint.safetensors")
    return int(tensors.pop("_step")), tensors
