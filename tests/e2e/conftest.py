"""The starter, trained once per session by the command that a user types, while the quick tests run."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
ZEPHYRA = (sys.executable, "-m", "deployments.cli")
TERMINAL = {**os.environ, "COLUMNS": "200"}
TRAINING_TIMEOUT_S = 480


def zephyra(*arguments: str, timeout_s: float = 480) -> subprocess.CompletedProcess[str]:
    """Run the command line in the checkout, as after `make setup`."""
    return subprocess.run(
        [*ZEPHYRA, *arguments],
        cwd=CHECKOUT,
        env=TERMINAL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@dataclass(frozen=True)
class Starter:
    """A trained starter and what its training printed."""

    root: Path
    data: Path
    output: str


class Training:
    """The command under way, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        from cluster.training.starter.generate import generate_starter

        self.folder = folder
        self._root, self._data, self._output = folder / "root", folder / "data", folder / "output.txt"
        generate_starter(self._data)
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [*ZEPHYRA, "train", "all", "--root", str(self._root), "--data", str(self._data)],
                cwd=CHECKOUT,
                env=TERMINAL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> Starter:
        """What it trained."""
        status = self._process.wait(TRAINING_TIMEOUT_S)
        output = self._output.read_text()
        assert status == 0, output
        return Starter(self._root, self._data, output)

    def stop(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()


TRAINING = pytest.StashKey[Training]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin training now, so that it is done when the quick tests are: it is what takes longest."""
    if any(item.get_closest_marker("starter") for item in session.items) and not session.config.option.collectonly:
        session.config.stash[TRAINING] = Training(Path(tempfile.mkdtemp(prefix="zephyra-starter-")))


def pytest_unconfigure(config: pytest.Config) -> None:
    if (training := config.stash.get(TRAINING, None)) is not None:
        training.stop()
        shutil.rmtree(training.folder)


@pytest.fixture(scope="session")
def starter(request: pytest.FixtureRequest) -> Starter:
    return request.config.stash[TRAINING].wait()


@pytest.fixture(scope="session")
def report(starter: Starter) -> dict[str, Any]:
    """The starter's evaluation on its test split, by the command that a user types."""
    done = zephyra("evaluate", "--root", str(starter.root), "--out", str(starter.root / "report"))
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads((starter.root / "report" / "report.json").read_text())
    return content
