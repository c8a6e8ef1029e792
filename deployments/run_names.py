"""Who runs under a name: one driver at a time, with the same settings, each stage once.

`runs/<run name>/run.json` holds the settings and the stages that are done. A lock on the folder ends with the process
that holds it, however that ends; machines that share the file system see it too.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.config.training import StageSettings
from cluster.errors import InvalidInput

_FILE = "run.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class NamedRun:
    """A run whose name is this process's own as long as it holds it."""

    def __init__(self, folder: Path, settings: StageSettings) -> None:
        self._file, self._settings = folder / _FILE, settings.model_dump(mode="json")
        kept = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self._before: dict[str, object] = kept.get("settings", self._settings)
        self.done: list[str] = kept.get("done", [])
        """Stages that are finished."""

    @property
    def changed(self) -> str | None:
        """The first setting that is another than before."""
        names = [*self._settings, *self._before]
        return next((name for name in names if self._settings.get(name) != self._before.get(name)), None)

    def add(self, stage: str | None = None) -> None:
        """Keep the settings, and that a stage is done."""
        if stage is not None:
            self.done.append(stage)
        draft = self._file.with_suffix(".draft")
        draft.write_text(json.dumps({"settings": self._settings, "done": self.done}, indent=2))
        draft.replace(self._file)


@contextmanager
def named_run(name: str, settings: StageSettings) -> Iterator[NamedRun]:
    """Hold the name of a run. Raises `InvalidInput` while another process does, for other settings than it began with,
    and for what cannot be a name.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"--run-name is {name!r}; use up to 100 of letters, digits, '.', '-' and '_'.")
    folder = settings.root / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"The run {name!r} is still going on; wait for it, stop it, or give another --run-name."
            ) from None
        run = NamedRun(folder, settings)
        if (changed := run.changed) is not None:
            raise InvalidInput(
                f"The run {name!r} began with another setting of {changed!r}; only the same settings resume a run: "
                "give those, or another --run-name."
            )
        run.add()
        yield run
    finally:
        os.close(descriptor)
