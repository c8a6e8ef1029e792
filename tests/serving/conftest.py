"""The deployments in one process, over the nano root, and what is handed in to them."""

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.nano import DOMAINS, build_root, publish_router
from tests.serving.handed_in import peft_folder
from tests.serving.http_client import client_of
from tests.serving.local import LocalSystem, local_system
from tests.serving.publishing import System, make


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


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    return tmp_path / "temp"


@pytest.fixture
def taught_root(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template / "root", tmp_path / "root")


@pytest.fixture
async def publishing(taught_root: Path, temp: Path) -> System:
    return make(taught_root, temp)


@pytest.fixture
async def domains_client(publishing: System) -> AsyncIterator[httpx.AsyncClient]:
    async with publishing.client() as client:
        yield client
