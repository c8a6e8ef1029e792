"""Ends a training where held-out rows get no better, and goes back to the weights that were best on them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class EarlyStop:
    """The best weights so far by validation loss, and how often since then it was no better."""

    def __init__(self, weights: Tensor, patience: int) -> None:
        """`weights` are watched, and changed by `finish` alone."""
        self._weights, self._patience = weights, patience
        self._best = weights.detach().clone()
        self._best_loss, self._num_worse = math.inf, 0

    @property
    def is_over(self) -> bool:
        """Whether the loss was no better so many times in a row."""
        return self._num_worse >= self._patience

    def tell(self, loss: float) -> None:
        """The weights as they are now have such a loss on the held-out rows."""
        if loss < self._best_loss:
            self._best_loss, self._num_worse = loss, 0
            self._best = self._weights.detach().clone()
        else:
            self._num_worse += 1

    def finish(self) -> None:
        """The weights are the best ones from here on, if any were measured."""
        if math.isfinite(self._best_loss):
            with torch.no_grad():
                self._weights.copy_(self._best)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        return {
            f"{prefix}best": self._best,
            f"{prefix}best_loss": torch.tensor(self._best_loss, dtype=torch.float64),
            f"{prefix}num_worse": torch.tensor(self._num_worse),
        }

    def load_tensors(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """The inverse of `tensors`."""
        self._best = tensors[f"{prefix}best"]
        self._best_loss = float(tensors[f"{prefix}best_loss"])
        self._num_worse = int(tensors[f"{prefix}num_worse"])
