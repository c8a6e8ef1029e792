"""A stage's surroundings for benchmarks: no terminal, no checkpoints; the losses are kept."""

from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.training.workers import Workers


class QuietRun:
    """A run that says nothing."""

    def __init__(self, workers: Workers | None = None) -> None:
        self.workers = workers or Workers()
        self.losses: list[float] = []

    def start(self, title: str, num_steps: int) -> None:
        pass

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" in metrics:  # what measures reports steps alone
            self.losses.append(metrics["loss"])

    def say(self, text: str) -> None:
        pass

    def checkpoint(self, save: Callable[[Path], None]) -> None:
        pass

    def restore(self) -> Path | None:
        return None
