"""A disk that is full, for real: the run ends with a sentence, the catalog is what it was, and with room it goes on."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cluster.config.training import AdapterSettings, BaseSettings, JointSettings, Recipe, RouterSettings, StageSettings
from cluster.errors import DiskFull
from cluster.lora.catalog import Catalog
from cluster.training import STAGES
from cluster.training.disk import full_disk_told
from cluster.training.run import LocalRun

RECIPE = Recipe(
    base=BaseSettings(size="nano", num_steps=6, tokens_per_batch=256),
    adapters=AdapterSettings(rank=2, num_steps=6, tokens_per_batch=128),
    router=RouterSettings(steps=6),
    joint=JointSettings(num_steps=6, rows_per_domain=1, epsilon=10.0),
    val_rows_per_domain=2,
    checkpoint_every_steps=2,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB; skipped where this process may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


class FullAt(LocalRun):
    """A local run on whose disk all but `free_bytes` is taken after so many steps, by somebody else."""

    def __init__(self, disk: Path, step: int, free_bytes: int, stage: str = "base") -> None:
        super().__init__(stage, disk / f"root/runs/{stage}", Console(quiet=True), disk / "root/events")
        self._disk, self._step, self._free_bytes = disk, step, free_bytes

    def report(self, step: int, metrics: object) -> None:
        super().report(step, metrics)  # type: ignore[arg-type]
        if step == self._step:
            fill(self._disk, self._free_bytes)


def fill(disk: Path, free_bytes: int) -> None:
    with (disk / "others").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - free_bytes))


@pytest.mark.parametrize(
    ("step", "kept"), [(1, "there was no checkpoint yet"), (3, "newest checkpoint is kept"), (6, "checkpoint is kept")]
)
def test_it_is_said_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, little_starter: Path, trained: Path, step: int, kept: str
) -> None:
    settings = StageSettings(root=small_disk / "root", data=little_starter, recipe=RECIPE, name="test")

    def run_stage(run: LocalRun) -> None:
        with run, full_disk_told(settings.root, run):
            STAGES["base"](settings, run)

    (small_disk / "root").mkdir()
    with pytest.raises(DiskFull, match=f"no room left .* The catalog is as it was, and .*{kept}: make room"):
        run_stage(FullAt(small_disk, step, free_bytes=2**16))
    assert Catalog(settings.root).latest() == 0
    assert not [file for file in settings.root.rglob("*") if "draft" in file.name]
    (small_disk / "others").unlink()
    run_stage(LocalRun("base", small_disk / "root/runs/base", Console(quiet=True)))
    assert Catalog(settings.root).load().base == 1
    one, other = (load_file(place / "base/1/model.safetensors") for place in (settings.root, trained / "after-base"))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("stage", ["adapters", "router", "joint"])
@pytest.mark.parametrize("step", [3, 6])
def test_so_it_is_in_every_later_stage(
    stage: str, step: int, small_disk: Path, little_starter: Path, trained: Path
) -> None:
    settings = StageSettings(root=small_disk / "root", data=little_starter, recipe=RECIPE, name="test")
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    shutil.copytree(trained / f"after-{earlier[-1]}", settings.root)
    before = Catalog(settings.root).load()

    def run_stage(run: LocalRun) -> None:
        with run, full_disk_told(settings.root, run):
            STAGES[stage](settings, run)

    # At the last step there is room for no more than a part of what is to be published.
    with pytest.raises(DiskFull, match=r"no room left .* The catalog is as it was, and the newest checkpoint is kept"):
        run_stage(FullAt(small_disk, step, free_bytes=2**13, stage=stage))
    assert Catalog(settings.root).load() == before
    assert not [file for file in settings.root.rglob("*") if "draft" in file.name]
    (small_disk / "others").unlink()
    run_stage(LocalRun(stage, small_disk / f"root/runs/{stage}", Console(quiet=True)))
    assert Catalog(settings.root).load() != before
    assert _published(settings.root) == _published(trained / f"after-{stage}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, little_starter: Path) -> Path:
    """What a root holds after each stage where there is room."""
    place = tmp_path_factory.mktemp("trained")
    settings = StageSettings(root=place / "root", data=little_starter, recipe=RECIPE, name="test")
    torch.set_num_threads(1)
    for stage in STAGES:
        with LocalRun(stage, place / "run", Console(quiet=True)) as run:
            STAGES[stage](settings, run)
        shutil.copytree(settings.root, place / f"after-{stage}")
    return place


def _published(root: Path) -> dict[str, bytes]:
    """What is current of adapters and the router, as bytes."""
    state = Catalog(root).load()
    files = {f"adapters/{n}": root / f"adapters/{n}/{v}/adapter_model.safetensors" for n, v in state.adapters.items()}
    if state.router is not None:
        files["router"] = root / f"router/{state.router}/router.safetensors"
    return {name: file.read_bytes() for name, file in files.items()}


def test_another_error_of_the_disk_is_none_of_this(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        LocalRun("x", tmp_path / "run", Console(quiet=True)) as run,
        full_disk_told(tmp_path, run),
    ):
        (tmp_path / "nowhere").read_text()


def test_a_generation_that_finds_no_room_leaves_no_draft(small_disk: Path) -> None:
    from cluster.lora.store import LocalStorage

    storage = LocalStorage(small_disk)
    assert storage.create("catalog/1.json", b"{}")
    fill(small_disk, 2**13)
    with pytest.raises(OSError, match="No space left"):
        storage.create("catalog/2.json", bytes(2**20))
    assert [file.name for file in (small_disk / "catalog").iterdir()] == ["1.json"]
