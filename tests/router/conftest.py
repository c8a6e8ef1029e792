"""One router, trained once, for all tests that only read it; one thread, since its products are small."""

from collections.abc import Iterator

import pytest
import torch

from cluster.config.training import RouterSettings
from cluster.router.fit import RouterFit
from cluster.router.tiny_ada import TinyAda
from tests.router.prompts import prompts

SETTINGS = RouterSettings(steps=120, batch_size=64, prototypes_per_domain=4)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads wait for each other longer than they work, the more so beside other processes."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def fit() -> RouterFit:
    """A training run that has not begun."""
    return RouterFit(*prompts("train", 60), *prompts("val", 20), SETTINGS, num_base_parameters=1_000_000)


@pytest.fixture(scope="session")
def ada() -> TinyAda:
    """A trained router. Read it; do not change it."""
    run = RouterFit(*prompts("train", 60), *prompts("val", 20), SETTINGS, num_base_parameters=1_000_000)
    for _ in range(run.num_steps):
        run.step()
    return run.finish()
