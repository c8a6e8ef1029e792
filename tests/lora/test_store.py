"""Storage: complete or absent, whatever is written at the same time or goes wrong, on a folder and in a bucket."""

import json
import os
import threading
from pathlib import Path

import pytest

from cluster.errors import CorruptArtifact, InvalidInput
from cluster.lora.artifacts import Store
from cluster.lora.bucket import BucketStorage
from cluster.lora.checksums import CHECKSUMS
from cluster.lora.store import LocalStorage, Storage, open_storage, write_folder, write_version


def _snapshot(folder: Path) -> dict[str, bytes]:
    """All files but the checksums, which have tests of their own."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != CHECKSUMS)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


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


def test_of_two_who_create_a_file_the_second_is_refused(storage: Storage) -> None:
    assert storage.create("catalog/1.json", b"first")
    assert not storage.create("catalog/1.json", b"second")
    assert storage.read("catalog/1.json", 100) == b"first"


def test_the_emulator_itself_refuses_the_second_create(s3_environment: dict[str, str]) -> None:
    """Asked by another client than the one under test, so that what is tested on it means something."""
    import boto3
    import botocore.exceptions

    client = boto3.client(
        "s3",
        endpoint_url=s3_environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="tests",
        aws_secret_access_key="tests",
    )
    client.put_object(Bucket="zephyra", Key="probe", Body=b"first", IfNoneMatch="*")
    with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket="zephyra", Key="probe", Body=b"second", IfNoneMatch="*")
    assert client.get_object(Bucket="zephyra", Key="probe")["Body"].read() == b"first"


def _at_once(num_threads: int, work: object) -> None:
    assert callable(work)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_of_many_who_create_at_once_one_wins_and_its_content_stays(storage: Storage) -> None:
    for attempt in range(5):
        won: list[bytes] = []

        def create(writer: int, name: str = f"race/{attempt}", won: list[bytes] = won) -> None:
            content = f"writer {writer}".encode()
            if storage.create(name, content):
                won.append(content)

        _at_once(6, create)
        assert [storage.read(f"race/{attempt}", 100)] == won


def test_a_create_whose_answer_was_lost_is_known_as_ones_own(tmp_path: Path) -> None:
    from obstore.store import MemoryStore

    storage = BucketStorage(MemoryStore(), tmp_path, "memory:///")
    assert storage.create("catalog/1.json", b"mine, by its id")
    assert storage.create("catalog/1.json", b"mine, by its id"), "the client asks again when it heard nothing"


def test_what_is_there_and_what_is_not(storage: Storage) -> None:
    for name in ("a/1", "a/b/2", "a/b/c/3"):
        storage.create(name, name.encode())
    assert sorted(storage.names("a")) == ["1", "b"]
    assert sorted(storage.names("a/b")) == ["2", "c"]
    assert storage.names("nothing") == []
    assert storage.exists("a/b/2")
    assert not storage.exists("a/b")
    assert not storage.exists("a/b/7")
    with pytest.raises(FileNotFoundError):
        storage.read("a/b/7", 10)
    with pytest.raises(CorruptArtifact, match="at most 4 bytes"):
        storage.read("a/b/2", 4)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".hidden", "a/.draft-1", "a\\b", "a\0b"]
)
def test_names_stay_below_the_root(storage: Storage, name: str) -> None:
    for ask in (storage.exists, storage.names, storage.folder, lambda n: storage.create(n, b"")):
        with pytest.raises(InvalidInput, match="cannot name an artifact"):
            ask(name)


def test_versions_of_every_storage_are_whole_and_numbered(storage: Storage) -> None:
    got: list[tuple[int, str]] = []

    def write(writer: int) -> None:
        for index in range(3):
            text = f"{writer}.{index}"
            got.append((storage.write_version("adapters/law", lambda folder, t=text: _write(folder, t)), text))

    _at_once(4, write)
    assert sorted(version for version, _ in got) == list(range(1, 13))
    assert sorted(storage.names("adapters/law"), key=int) == [str(version) for version in range(1, 13)]
    for version, text in got:
        assert _snapshot(storage.folder(f"adapters/law/{version}")) == {"deep/file": text.encode()}
    with pytest.raises(FileNotFoundError):
        storage.folder("adapters/law/13")


def test_a_writer_that_dies_leaves_no_version(storage: Storage) -> None:
    def fail(folder: Path) -> None:
        _write(folder, "half")
        raise KeyboardInterrupt

    storage.write_version("router", lambda folder: _write(folder, "first"))
    with pytest.raises(KeyboardInterrupt):
        storage.write_version("router", fail)
    assert storage.names("router") == ["1"]


def test_an_upload_that_stops_half_way_is_no_version(tmp_path: Path) -> None:
    from obstore.store import MemoryStore

    storage = BucketStorage(MemoryStore(), tmp_path / "cache", "memory:///")
    storage.create("router/1/claim", b"of a writer that was killed")
    storage.create("router/1/deep/file", b"what it had sent")
    with pytest.raises(FileNotFoundError):
        storage.folder("router/1")
    assert storage.write_version("router", lambda folder: _write(folder, "next")) == 2


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_what_a_bucket_gives_is_compared_with_what_was_published(tmp_path: Path, damage: str) -> None:
    import obstore
    from obstore.store import MemoryStore

    store = MemoryStore()
    storage = BucketStorage(store, tmp_path / "cache", "memory:///")
    storage.write_version("router", lambda folder: _write(folder, "content"))
    if damage == "gone":
        obstore.delete(store, "router/1/deep/file")
    else:
        obstore.put(store, "router/1/deep/file", b"contend" if damage == "changed" else b"conten")
    with pytest.raises(CorruptArtifact, match="deep/file"):
        storage.folder("router/1")
    assert not (tmp_path / "cache/router/1").exists(), "nothing half is kept"
    obstore.put(store, "router/1/deep/file", b"content")
    assert _snapshot(storage.folder("router/1")) == {"deep/file": b"content"}


def test_a_version_in_the_cache_is_not_fetched_again(tmp_path: Path) -> None:
    import obstore
    from obstore.store import MemoryStore

    store = MemoryStore()
    storage = BucketStorage(store, tmp_path / "cache", "memory:///")
    storage.write_version("router", lambda folder: _write(folder, "content"))
    before = _snapshot(storage.folder("router/1"))
    obstore.delete(store, [f"router/1/{name}" for name in ("deep/file", "checksums.json", "claim")])
    assert _snapshot(storage.folder("router/1")) == before


def test_a_damaged_copy_in_the_cache_is_fetched_again_and_a_damaged_original_is_refused(tmp_path: Path) -> None:
    from obstore.store import MemoryStore

    storage = BucketStorage(MemoryStore(), tmp_path / "cache", "memory:///")
    storage.write_version("router", lambda folder: _write(folder, "content"))
    copied = storage.folder("router/1") / "deep" / "file"
    copied.write_bytes(b"contend")
    assert _snapshot(Store(storage).folder("router/1"))["deep/file"] == b"content"
    local = open_storage(tmp_path / "root")
    local.write_version("router", lambda folder: _write(folder, "content"))
    (tmp_path / "root" / "router" / "1" / "deep" / "file").write_bytes(b"contend")
    with pytest.raises(CorruptArtifact, match="deep/file"):
        Store(local).folder("router/1")


def test_links_do_not_lead_out_of_the_root(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.json").write_text("{}")
    storage = LocalStorage(tmp_path / "root")
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "outside", tmp_path / "root/catalog")
    for ask in (storage.exists, lambda name: storage.read(name, 10), lambda name: storage.create(name, b"")):
        with pytest.raises(CorruptArtifact, match="link out of the root"):
            ask("catalog/secret.json")


def test_a_link_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    with pytest.raises(InvalidInput, match="is a link"):
        write_version(tmp_path / "router", lambda folder: os.symlink(tmp_path / "secret", folder / "file"))
    assert list((tmp_path / "router").iterdir()) == []


def test_a_root_is_a_folder_or_one_of_four_schemes(tmp_path: Path, s3_root: str) -> None:
    open_storage(tmp_path).create("x", b"1")
    for root in (str(tmp_path), f"file://{tmp_path}"):
        assert open_storage(root).read("x", 1) == b"1"
    assert isinstance(open_storage(s3_root), BucketStorage)
    for root in ("http://example.com/x", "ftp://x/y", "memory:///"):
        with pytest.raises(InvalidInput, match="expected file, s3, gs or az"):
            open_storage(root)


def test_a_version_without_checksums_is_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_version("router", lambda folder: _write(folder, "text"))
    (tmp_path / "router/1" / CHECKSUMS).unlink()
    with pytest.raises(CorruptArtifact, match=r"router/1 has no checksums\.json"):
        Store(storage).folder("router/1")


def test_checksums_name_every_file(tmp_path: Path) -> None:
    write_version(tmp_path, lambda folder: _write(folder, "text"))
    content = json.loads((tmp_path / "1" / CHECKSUMS).read_text())
    # printf text | sha256sum
    expected = "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    assert content == {"files": {"deep/file": {"bytes": 4, "sha256": expected}}}
