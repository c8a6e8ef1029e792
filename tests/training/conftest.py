"""One thread, since products of nano models are faster so and tests share the machine; and a little of the starter."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.training.starter import generate


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def little_starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter's domains with a twentieth of their rows: a stage of a few steps would spend its time on reading."""
    folder = tmp_path_factory.mktemp("starter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "TRAIN_ROWS_PER_DOMAIN", 100)
        patch.setattr(generate, "HELD_OUT_ROWS_PER_DOMAIN", 10)
        patch.setattr(generate, "NONE_ROWS", {"train": 125, "val": 20, "test": 20})
        patch.setattr(generate, "BASE_ROWS", [(kind, count // 20) for kind, count in generate.BASE_ROWS])
        generate.generate_starter(folder)
    return folder
