"""The starter, trained once by the command that a user types, while the quick tests run; and served."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port

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
    """A trained starter and what its training printed, in one folder."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"


class Training:
    """The command under way, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        from cluster.training.starter.generate import generate_starter

        self.starter = Starter(folder)
        generate_starter(self.starter.data)
        with self.starter.output.open("w") as output:
            self._process = subprocess.Popen(
                [*ZEPHYRA, "train", "all", "--root", str(self.starter.root), "--data", str(self.starter.data)],
                cwd=CHECKOUT,
                env=TERMINAL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> Starter:
        """What it trained."""
        status = self._process.wait(TRAINING_TIMEOUT_S)
        assert status == 0, self.starter.output.read_text()
        return self.starter

    def stop(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()


TRAINING = pytest.StashKey[Training]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin training now, so that it is done when the quick tests are: it is what takes longest."""
    config = session.config
    if config.option.starter or config.option.collectonly or hasattr(config, "workerinput"):
        return
    if any(item.get_closest_marker("starter") for item in session.items):
        config.stash[TRAINING] = Training(Path(tempfile.mkdtemp(prefix="zephyra-starter-")))


def pytest_unconfigure(config: pytest.Config) -> None:
    if (training := config.stash.get(TRAINING, None)) is not None:
        training.stop()
        shutil.rmtree(training.starter.folder)


@pytest.fixture(scope="session")
def starter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Starter:
    if (training := request.config.stash.get(TRAINING, None)) is not None:
        return training.wait()
    # A folder that other processes see: the first that comes here trains, the others find it done.
    folder: Path = request.config.option.starter or tmp_path_factory.getbasetemp().parent / "starter"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "is_trained").exists():
            training = Training(folder.resolve())
            try:
                training.wait()
            finally:
                training.stop()
            (folder / "is_trained").touch()
    return Starter(folder.resolve())


@pytest.fixture(scope="session")
def report(starter: Starter) -> dict[str, Any]:
    """The starter's evaluation on its test split, by the command that a user types."""
    done = zephyra("evaluate", "--root", str(starter.root), "--out", str(starter.root / "report"))
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads((starter.root / "report" / "report.json").read_text())
    return content


@pytest.fixture(scope="package")
def served(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """HTTP and gRPC addresses of a server started as a user starts it, and what it printed."""
    http, grpc, dashboard = free_port(), free_port(), free_port()
    ports = ["--port", str(http), "--grpc-port", str(grpc), "--dashboard-port", str(dashboard)]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.cli", "serve", "--root", str(starter.root), *ports],
            cwd=CHECKOUT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            _wait_for_invitation(process, log)
            yield f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", log.read_text()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _wait_for_invitation(process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        if "Ctrl-C stops it" in log.read_text():
            return
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
        break
    pytest.fail(log.read_text())
