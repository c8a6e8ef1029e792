"""Runs that tests look into, and can stop."""

from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.training.workers import Workers


class Stopped(Exception):
    """What a test raises where a process would be killed."""


class FolderRun:
    """A run that keeps what it is told, and can be stopped right after a checkpoint."""

    def __init__(self, folder: Path, stop_after: int | None = None, workers: Workers | None = None) -> None:
        self.workers = workers or Workers()
        self._folder, self._stop_after = folder, stop_after
        self.said: list[str] = []
        self.steps: list[int] = []

    def start(self, title: str, num_steps: int) -> None:
        pass

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def say(self, text: str) -> None:
        self.said.append(text)

    def checkpoint(self, save: Callable[[Path], None]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        save(self._folder)
        if self.steps[-1] == self._stop_after:
            raise Stopped

    def restore(self) -> Path | None:
        return self._folder if self._folder.is_dir() else None
