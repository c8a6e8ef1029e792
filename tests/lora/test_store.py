"""Versioned folders: complete or absent, whatever is written at the same time or goes wrong."""

import threading
from pathlib import Path

import pytest

from cluster.lora.store import write_folder, write_version


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_versions_count_up_and_keep_what_was_written(tmp_path: Path) -> None:
    parent = tmp_path / "adapters" / "law"
    for number in range(1, 13):  # past 9: numbers, not names, are compared
        assert write_version(parent, lambda folder, n=number: _write(folder, f"content {n}")) == number
    assert _snapshot(parent) == {f"{n}/deep/file": f"content {n}".encode() for n in range(1, 13)}


def _write(folder: Path, text: str) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text(text)


def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write_version(tmp_path, lambda folder: _write(folder, "first"))
    before = _snapshot(tmp_path)

    def fail(folder: Path) -> None:
        _write(folder, "half")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_version(tmp_path, fail)
    assert _snapshot(tmp_path) == before
    assert [f.name for f in tmp_path.iterdir()] == ["1"]
    assert write_version(tmp_path, lambda folder: _write(folder, "second")) == 2


def test_writers_at_once_get_different_numbers(tmp_path: Path) -> None:
    num_writers, each = 6, 5
    start = threading.Barrier(num_writers)
    got: list[tuple[int, str]] = []

    def write(writer: int) -> None:
        start.wait()
        for index in range(each):
            text = f"{writer}.{index}"
            got.append((write_version(tmp_path, lambda folder, t=text: _write(folder, t)), text))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(num_writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(version for version, _ in got) == list(range(1, num_writers * each + 1))
    assert _snapshot(tmp_path) == {f"{version}/deep/file": text.encode() for version, text in got}


def test_a_named_folder_is_whole_or_absent_and_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "base" / "1-int8"

    def fail(draft: Path) -> None:
        _write(draft, "half")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_folder(folder, fail)
    assert not list(folder.parent.iterdir())
    write_folder(folder, lambda draft: _write(draft, "first"))
    with pytest.raises(FileExistsError):
        write_folder(folder, lambda draft: _write(draft, "second"))

    other = tmp_path / "base" / "1-int4"
    with pytest.raises(OSError, match="not empty"):  # another writer was first, while this one wrote
        write_folder(other, lambda draft: (_write(draft, "late"), other.mkdir(), _write(other, "early"))[0])
    assert _snapshot(folder.parent) == {"1-int8/deep/file": b"first", "1-int4/deep/file": b"early"}
