"""What changes from step to step of a training run, as plain tensors that safetensors can hold."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def state_of(trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters, and what the optimizer, which holds them in this order, remembers of each."""
    state = {f"parameter.{index}": parameter.detach().clone() for index, parameter in enumerate(trained)}
    for index, moments in optimizer.state_dict()["state"].items():
        state.update({f"optimizer.{index}.{name}": value.clone() for name, value in moments.items()})
    return state


def fits(trained: Sequence[nn.Parameter], state: Mapping[str, Tensor]) -> bool:
    """Whether `state` holds each of the parameters, in its shape."""
    given = [state.get(f"parameter.{index}") for index in range(len(trained))]
    return all(value is not None and value.shape == own.shape for value, own in zip(given, trained, strict=True))


@torch.no_grad()
def restore(trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Go on where `state_of` was called; `state` may hold more."""
    for index, own in enumerate(trained):
        own.copy_(state[f"parameter.{index}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith("optimizer."):
            _, index_text, moment = name.split(".")
            moments.setdefault(int(index_text), {})[moment] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
