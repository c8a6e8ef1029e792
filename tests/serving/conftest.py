"""The deployments in one process, over the nano root."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.nano import DOMAINS
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
