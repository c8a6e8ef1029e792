"""A stage as a Ray Train job, on the shared cluster."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.config import BaseSettings, Recipe, StageSettings
from cluster.errors import InvalidInput
from cluster.lora.catalog import Catalog
from cluster.training.starter.generate import generate_starter
from deployments.train import fit
from tests.conftest import Served

pytestmark = pytest.mark.ray

RECIPE = Recipe(
    base=BaseSettings(size="nano", num_steps=4, tokens_per_batch=256), val_rows_per_domain=2, checkpoint_every_steps=2
)


def test_a_stage_publishes_and_a_run_of_the_same_name_goes_on_from_its_checkpoint(
    served: Served, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    generate_starter(tmp_path / "data")
    settings = StageSettings(root=root, data=tmp_path / "data", recipe=RECIPE, name="test")
    fit("base", settings, run_name="one", num_cpus=0.5)
    assert Catalog(root).load().base == 1
    # All steps are done: a run that resumes has nothing left to learn and publishes the same weights.
    fit("base", settings, run_name="one", num_cpus=0.5)
    assert Catalog(root).load().base == 2
    first, second = (load_file(root / "base" / version / "model.safetensors") for version in ("1", "2"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_the_user_did_wrong_comes_back_as_it_was_said(served: Served, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    settings = StageSettings(root=tmp_path / "root", data=tmp_path / "data", recipe=RECIPE, name="test")
    with pytest.raises(InvalidInput, match="no Parquet file below"):
        fit("base", settings, run_name="two", num_cpus=0.5)
