"""The starter, trained once per session by the command that a user types."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def zephyra(*arguments: str, timeout_s: float = 480) -> subprocess.CompletedProcess[str]:
    """Run the command line in the checkout, as after `make setup`."""
    return subprocess.run(
        [sys.executable, "-m", "deployments.cli", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "COLUMNS": "200"},
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


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Starter:
    from cluster.training.starter.generate import generate_starter

    folder = tmp_path_factory.mktemp("starter")
    generate_starter(folder / "data")
    done = zephyra("train", "all", "--root", str(folder / "root"), "--data", str(folder / "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    return Starter(folder / "root", folder / "data", done.stdout)


@pytest.fixture(scope="session")
def report(starter: Starter) -> dict[str, Any]:
    """The starter's evaluation on its test split, by the command that a user types."""
    done = zephyra("evaluate", "--root", str(starter.root), "--json", str(starter.root / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads((starter.root / "report.json").read_text())
    return content
