"""Metrics of a run as TensorBoard event files: `tensorboard --logdir ROOT/events`."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

FOLDER = "events"
_EVERY_S = 1.0


class EventLog:
    """Curves of one run. A run that goes on writes into the same folder, and its steps continue."""

    def __init__(self, folder: Path) -> None:
        """The folder is made with the first values."""
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._title, self._num_steps = "", 0
        self._written_s = 0.0

    def start(self, title: str, num_steps: int) -> None:
        """A part of the work begins: its curves have names of their own."""
        self._title, self._num_steps = "_".join(title.split()[1:] or title.split()), num_steps

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """At most once a second, and the last step."""
        now_s = time.monotonic()
        if not metrics or (now_s - self._written_s < _EVERY_S and step != self._num_steps):
            return
        self._written_s = now_s
        if self._writer is None:
            # Steps from here on replace those that a killed run had told and not kept.
            # The suffix: files are otherwise named by the second.
            self._writer = SummaryWriter(str(self._folder), purge_step=step, filename_suffix=f".{time.time_ns()}")
        for name, value in metrics.items():
            self._writer.add_scalar(f"{self._title}/{name}", value, step)

    def close(self) -> None:
        """Everything is on the disk."""
        if self._writer is not None:
            self._writer.close()
