"""A stage as a Ray Train job, on the shared cluster."""

import shutil
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cluster.config.training import AdapterSettings, BaseSettings, Recipe, StageSettings
from cluster.errors import InvalidInput
from cluster.lora.catalog import Catalog, Change
from cluster.training.stage_adapters import train_adapters
from deployments.train import fit
from tests.conftest import Served
from tests.training.rows import write_parquet
from tests.training.runs import FolderRun
from tests.training.test_tracking import curves

pytestmark = pytest.mark.ray

RECIPE = Recipe(
    base=BaseSettings(size="nano", num_steps=6, tokens_per_batch=256),
    adapters=AdapterSettings(rank=2, num_steps=18, tokens_per_batch=128, learned_loss=0.0),
    val_rows_per_domain=2,
    checkpoint_every_steps=3,
)


def write_data(folder: Path) -> Path:
    """Three domains and what is of none; little, since each worker of each stage reads it and makes a tokenizer."""
    folder.mkdir()
    rows = [
        (name, f"{name} question {number}", f"the answer to {name} is {number * 7}", "train" if number % 5 else "val")
        for name in ("law", "math", "sql", "none")
        for number in range(60)
    ]
    domains, prompts, responses, splits = (list(column) for column in zip(*rows, strict=True))
    return write_parquet(folder, domain=domains, prompt=prompts, response=responses, split=splits)


@pytest.fixture(scope="module")
def with_base(served: Served, tmp_path_factory: pytest.TempPathFactory) -> StageSettings:
    """What stages are run with, on a root whose base two workers have trained. A job takes ten processes to start."""
    folder = tmp_path_factory.mktemp("job")
    settings = StageSettings(root=folder / "root", data=write_data(folder / "data"), recipe=RECIPE, name="test")
    fit("base", settings, run_name="two", num_cpus=0.25, num_workers=2, shards_base=True)
    return settings


def test_a_stage_publishes_and_a_run_of_the_same_name_goes_on_from_its_checkpoint(
    with_base: StageSettings, tmp_path: Path
) -> None:
    """By one worker, as jobs are where nothing else is asked."""
    root = tmp_path / "root"
    settings = with_base.model_copy(update={"root": root})
    fit("base", settings, run_name="one", num_cpus=0.5)
    assert Catalog(root).load().base == 1
    # All steps are done: a run that resumes has nothing left to learn and publishes the same weights.
    fit("base", settings, run_name="one", num_cpus=0.5)
    assert Catalog(root).load().base == 2
    assert len(list((root / "events" / f"base-{settings.mark}").iterdir())) == 1, "there were curves to write"
    first, second = (load_file(root / "base" / version / "model.safetensors") for version in ("1", "2"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_workers_one_of_them_killed_publish_what_one_does(with_base: StageSettings, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one, two = (with_base.model_copy(update={"root": tmp_path / name}) for name in ("one", "two"))
    for settings in (one, two):
        shutil.copytree(with_base.root / "base" / "1", settings.root / "base" / "1")
        Catalog(settings.root).publish(Change(base=1))
    train_adapters(one, FolderRun(tmp_path / "run"))
    killer = Thread(target=_kill_a_worker_after_a_checkpoint, args=(two.root / "runs",), daemon=True)
    killer.start()
    fit("adapters", two, run_name="two", num_cpus=0.25, num_workers=2)
    killer.join(timeout=1)
    # A file of curves for each time that the first worker began; the second time it went on from a checkpoint.
    _, last = sorted((two.root / "events" / f"adapters-{two.mark}").iterdir())
    (tmp_path / "last").mkdir()
    shutil.copy(last, tmp_path / "last")
    assert min(step for curve in curves(tmp_path / "last").values() for step in curve) > 3
    state = Catalog(two.root).load()
    assert state.generation == 2, "base, and all adapters at once"
    assert state.adapters == Catalog(one.root).load().adapters
    for domain in state.adapters:
        ours, theirs = (
            load_file(root / "adapters" / domain / "1" / "adapter_model.safetensors") for root in (one.root, two.root)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def _kill_a_worker_after_a_checkpoint(runs: Path) -> None:
    """SIGKILL to the second of the two workers, once Ray has noted a checkpoint: files alone are not one yet."""
    while not list(runs.glob("two-adapters-*/checkpoint_manager_snapshot.json")):
        time.sleep(0.02)
    workers = [process for process in psutil.Process().children(recursive=True) if "TrainWorker" in process.name()]
    max(workers, key=lambda process: process.create_time()).kill()


def test_what_the_user_did_wrong_comes_back_as_it_was_said(served: Served, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    settings = StageSettings(root=tmp_path / "root", data=tmp_path / "data", recipe=RECIPE, name="test")
    with pytest.raises(InvalidInput, match="no Parquet file below"):
        fit("base", settings, run_name="two", num_cpus=0.5)
