"""What a stage needs from whoever runs it: to report, to keep and find a checkpoint, to know when to stop.

A stage is `stage(settings, run)`. This is the local form; deployments hold the one for Ray Train.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cluster.training.tracking import EventLog
from cluster.training.workers import Workers


class Run(Protocol):
    """The surroundings of one stage, on one of its workers."""

    workers: Workers
    """Those that run the stage together."""

    def start(self, title: str, num_steps: int) -> None:
        """A part of the work begins that will take so many steps."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done; `metrics` are the newest values (loss, tokens_per_s, ...)."""

    def say(self, text: str) -> None:
        """A line for people: what was measured, published or decided."""

    def checkpoint(self, save: Callable[[Path], None]) -> None:
        """Keep what `save` writes into the folder it is given, in place of the checkpoint before.

        All workers call it equally often; what they write, under names that differ, becomes one checkpoint.
        """

    def restore(self) -> Path | None:
        """The folder of the newest checkpoint, None on a fresh start."""


class LocalRun:
    """A stage in this process: a progress bar on the terminal, checkpoints in a folder."""

    def __init__(
        self,
        name: str,
        folder: Path,
        console: Console,
        events: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`events`: where the curves are kept; nowhere by default. `device`: where is computed, by default the CPU."""
        self.workers = Workers(device=device)
        self._name, self._folder, self._console = name, folder, console
        self._events = EventLog(events) if events is not None else None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed_s = 0.0

    def __enter__(self) -> "LocalRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close_bar()
        if self._events is not None:
            self._events.close()
        if kind is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, title: str, num_steps: int) -> None:
        self._close_bar()
        if self._events is not None:
            self._events.start(title, num_steps)
        self._progress = Progress(
            TextColumn("[bold]{task.description:<22}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task(title, total=num_steps, metrics="")

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        text = "  ".join(
            f"{name} {value:,.0f}" if value >= 100 else f"{name} {value:.3f}" for name, value in metrics.items()
        )
        if self._events is not None:
            self._events.report(step, metrics)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, metrics=text)
        if not self._console.is_terminal and time.monotonic() - self._printed_s > 10:
            self._printed_s = time.monotonic()
            self._console.print(f"{self._name}: step {step}  {text}")

    def say(self, text: str) -> None:
        self._console.print(text)

    def checkpoint(self, save: Callable[[Path], None]) -> None:
        # Numbered, so that the one before is there until the new one is complete.
        numbers = self._numbers()
        draft = self._folder / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            save(draft)
        except BaseException:
            # On a full disk, half a checkpoint is in the way of everybody.
            shutil.rmtree(draft, ignore_errors=True)
            raise
        draft.rename(self._folder / str(max(numbers, default=0) + 1))
        for number in numbers:
            shutil.rmtree(self._folder / str(number))

    def restore(self) -> Path | None:
        numbers = self._numbers()
        return self._folder / str(max(numbers)) if numbers else None

    def _numbers(self) -> list[int]:
        folders = self._folder.iterdir() if self._folder.is_dir() else ()
        return [int(folder.name) for folder in folders if folder.name.isdecimal()]

    def _close_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None
