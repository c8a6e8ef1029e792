"""One thread: products of nano models are faster so, and tests share the machine. And every kind of storage."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from obstore.store import MemoryStore

from cluster.lora.bucket import BucketStorage
from cluster.lora.store import LocalStorage, Storage, open_storage


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["folder", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Empty storage: a folder, obstore's own memory, and an S3 behind HTTP."""
    if request.param == "folder":
        return LocalStorage(tmp_path / "root")
    if request.param == "memory":
        return BucketStorage(MemoryStore(), tmp_path / "cache", "memory:///")
    return open_storage(request.getfixturevalue("s3_root"))
