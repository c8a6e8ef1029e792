"""Folders of uploads: bounded in bytes and number, and gone whatever happens to who made them."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cluster.errors import InvalidInput, Overloaded, PublisherUnavailable, UploadTooLarge
from deployments.domains.uploads import Uploads


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def folders(temp: Path) -> list[Path]:
    return [path for path in temp.rglob("*") if path.name == "upload"]


def test_pieces_are_joined_and_counted_over_all_files_of_one_upload(temp: Path) -> None:
    uploads = Uploads(max_bytes=10)
    one, other = uploads.open(), uploads.open()
    for piece in (b"abc", b"", b"de"):
        uploads.write(one, "adapter_config.json", piece)
    uploads.write(one, "zephyra.json", b"12345")
    assert (uploads.folder(one) / "adapter_config.json").read_bytes() == b"abcde"
    with pytest.raises(UploadTooLarge, match="larger than 10 bytes"):
        uploads.write(one, "examples.txt", b"x")
    uploads.write(other, "examples.txt", bytes(10))
    for name in ("../catalog/9.json", "/etc/passwd", "adapter_model.bin"):
        with pytest.raises(InvalidInput, match="is no file of a domain"):
            uploads.write(other, name, b"x")
    uploads.discard(one)
    uploads.discard(one)
    with pytest.raises(PublisherUnavailable, match="send it again"):
        uploads.write(one, "zephyra.json", b"x")
    assert folders(temp) == [uploads.folder(other)]
    uploads.close()
    assert list(temp.iterdir()) == []


def test_there_are_so_many_at_once_and_idle_ones_make_room(temp: Path) -> None:
    uploads = Uploads(max_bytes=10, max_open=2, idle_s=0.2)
    first, second = uploads.open(), uploads.open()
    with pytest.raises(Overloaded, match="2 uploads are under way"):
        uploads.open()
    time.sleep(0.15)
    uploads.write(second, "zephyra.json", b"x")
    time.sleep(0.1)
    third = uploads.open()
    assert set(folders(temp)) == {uploads.folder(second), uploads.folder(third)}
    with pytest.raises(PublisherUnavailable):
        uploads.folder(first)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(temp: Path) -> None:
    code = "import os, signal; from deployments.domains.uploads import Uploads; uploads = Uploads(9); uploads.open()"
    command = [sys.executable, "-c", f"{code}; os.kill(os.getpid(), signal.SIGKILL)"]
    subprocess.run(command, env={**os.environ, "TMPDIR": str(temp)}, check=False)
    living = Uploads(max_bytes=10)
    kept = living.folder(living.open())
    assert len(folders(temp)) == 2, "a young one may be about to be held"
    hour_ago_s = time.time() - 3600
    for folder in temp.iterdir():
        os.utime(folder, (hour_ago_s, hour_ago_s))
    Uploads(max_bytes=10)
    assert folders(temp) == [kept]
