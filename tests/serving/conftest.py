"""The deployments in one process, over the nano root, and what is handed in to them."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.nano import DOMAINS, build_root, publish_router
from tests.serving.handed_in import peft_folder
from tests.serving.http_client import client_of
from tests.serving.local import LocalSystem, local_system


@pytest.fixture
async def system(root: Path) -> AsyncIterator[LocalSystem]:
    system = local_system(root, DOMAINS)
    yield system
    system.replica.engine.stop()


@pytest.fixture
async def client(system: LocalSystem) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(system.gateway) as client:
        yield client


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a router, and an adapter for it; made once, since it takes a training."""
    folder = tmp_path_factory.mktemp("template")
    publish_router(build_root(folder / "root"))
    peft_folder(folder / "root", folder / "peft")
    return folder


@pytest.fixture
def adapter(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template / "peft", tmp_path / "peft")
