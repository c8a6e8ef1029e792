"""A run's name is one process's at a time, of the same settings, and each stage is run once under it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.config.training import BaseSettings, Recipe, StageSettings
from cluster.errors import InvalidInput
from cluster.training.recipes import RECIPES
from deployments import train
from deployments.run_names import named_run


def settings(root: Path, **changed: Any) -> StageSettings:
    return StageSettings(**{"root": root, "data": root / "data", "recipe": Recipe(), "name": "starter", **changed})


def test_the_same_settings_go_on_and_others_are_refused(tmp_path: Path) -> None:
    with named_run("one", settings(tmp_path)) as run:
        run.add("base")
    with named_run("one", settings(tmp_path)) as run:
        assert run.done == ["base"]
    others = {
        "data": settings(tmp_path, data=tmp_path / "other"),
        "recipe": settings(tmp_path, recipe=Recipe(base=BaseSettings(num_steps=7))),
        "base": settings(tmp_path, base="/some/base"),
    }
    for name, other in others.items():
        with pytest.raises(InvalidInput, match=f"another setting of '{name}'"), named_run("one", other):
            pass
    with named_run("two", others["data"]) as run:
        assert run.done == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 101])
def test_what_cannot_be_a_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="--run-name is"), named_run(name, settings(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []


_HOLDER = """
import sys, time
from pathlib import Path
from cluster.config.training import Recipe, StageSettings
from deployments.run_names import named_run
root = Path(sys.argv[1])
with named_run("one", StageSettings(root=root, data=root / "data", recipe=Recipe(), name="starter")):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_name_is_held_as_long_as_its_process_lives_however_that_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InvalidInput, match="'one' is still going on"), named_run("one", settings(tmp_path)):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with named_run("one", settings(tmp_path)) as run:
        assert run.done == []


def test_a_finished_run_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--root", str(tmp_path), "--data", str(tmp_path / "data"), "--recipe", "starter", "--run-name", "one"]
    with named_run("one", settings(tmp_path, recipe=RECIPES["starter"])) as run:
        for stage in ("base", "adapters", "router", "joint"):
            run.add(stage)
    for stage in ("base", "all"):
        assert train.main([stage, *given]) == 1
        assert f"The run 'one' of '{stage}' is finished; give another --run-name" in capsys.readouterr().err


def test_a_domain_and_its_stage_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--root", str(tmp_path), "--data", str(tmp_path / "data")]
    for wrong in (["domain", *given], ["base", *given, "--domain", "tax"]):
        assert train.main(wrong) == 1
        assert "--domain and stage 'domain' go together" in capsys.readouterr().err
