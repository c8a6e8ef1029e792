"""A stopped run goes on where it was; other data, another recipe or `again` starts over. Checkpoints are kept whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cluster.config.training import Recipe, StageSettings
from cluster.training import STAGES
from cluster.training.pipeline import data_of, is_trained, run_all
from cluster.training.run import LocalRun


def _settings(root: Path, data: str = "/data", name: str = "starter", base: str | None = None) -> StageSettings:
    return StageSettings(root=root, data=Path(data), recipe=Recipe(), name=name, base=base)


class Stages:
    """Runs nothing, notes what it was asked to run, and dies at one stage."""

    def __init__(self, dies_at: str | None = None) -> None:
        self.ran: list[str] = []
        self._dies_at = dies_at

    def __call__(self, stage: str) -> None:
        if stage == self._dies_at:
            raise KeyboardInterrupt
        self.ran.append(stage)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    every = list(STAGES)
    assert not is_trained(tmp_path)
    first = Stages(dies_at="router")
    with pytest.raises(KeyboardInterrupt):
        run_all(_settings(tmp_path), first, again=False)
    assert first.ran == every[:2]
    assert not is_trained(tmp_path)
    second = Stages()
    assert run_all(_settings(tmp_path), second, again=False)
    assert second.ran == every[2:]
    assert is_trained(tmp_path)
    assert data_of(tmp_path) == Path("/data")
    third = Stages()
    assert not run_all(_settings(tmp_path), third, again=False)
    assert third.ran == []


@pytest.mark.parametrize("change", [{"data": "/other"}, {"name": "open-domains"}, {"base": "a/b"}, {"again": True}])
def test_other_data_another_recipe_or_base_or_again_starts_over(tmp_path: Path, change: dict[str, str | bool]) -> None:
    run_all(_settings(tmp_path), Stages(), again=False)
    stages = Stages(dies_at="router")
    settings = _settings(tmp_path, **{name: str(value) for name, value in change.items() if name != "again"})
    with pytest.raises(KeyboardInterrupt):
        run_all(settings, stages, again="again" in change)
    assert stages.ran == list(STAGES)[:2]
    assert not is_trained(tmp_path), "what was trained before is no longer whole"


def _write(text: str, fails: bool = False) -> Callable[[Path], None]:
    """Something to keep in a checkpoint, on a disk that may fill up."""

    def write(folder: Path) -> None:
        (folder / "state").write_text(text)
        if fails:
            raise OSError("the disk is full")

    return write


def test_a_local_run_keeps_its_newest_whole_checkpoint_until_it_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "base"
    stopped = LocalRun("base", folder, Console(quiet=True))
    assert stopped.restore() is None
    stopped.checkpoint(_write("first"))
    stopped.checkpoint(_write("second"))
    with pytest.raises(OSError, match="disk is full"), stopped:
        stopped.checkpoint(_write("third", fails=True))
    with LocalRun("base", folder, Console(quiet=True)) as resumed:
        restored = resumed.restore()
        assert restored is not None
        assert (restored / "state").read_text() == "second"
    assert LocalRun("base", folder, Console(quiet=True)).restore() is None
