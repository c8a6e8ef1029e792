"""A bucket as storage, through obstore: S3, Google Cloud Storage, Azure. What is read as a folder is kept on the disk.

Credentials and endpoints are found where the providers' own tools look for them. A version's number is claimed by a
file created only if absent; its checksums come last, and until they are there the version is not.
"""

import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from cluster.environment import cache_folder
from cluster.errors import CorruptArtifact, StorageUnavailable
from cluster.lora.checksums import (
    CHECKSUMS,
    MAX_CHECKSUMS_BYTES,
    FileSum,
    check_folder,
    check_name,
    parse_checksums,
    write_checksums,
)
from cluster.lora.store import next_version

_CLAIM = "claim"
_PIECE_BYTES = 32 * 2**20
"""A request has half a minute; a base may take longer."""
_TRANSFERS = 8
"""Files of one version that travel at once."""


def open_bucket(uri: str) -> "BucketStorage":
    """The bucket that `uri` names, with a cache of its own on this machine."""
    with _answering(uri):
        # Without options of the client, so that those in the environment count (AWS_ALLOW_HTTP, ...).
        store = from_url(uri, retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=10)})
    mark = hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:16]
    return BucketStorage(store, cache_folder() / "roots" / mark, uri)


class BucketStorage:
    """Objects below one prefix. Folders of versions are copied below `cache`, which may be removed at any time."""

    def __init__(self, store: ObjectStore, cache: Path, location: str) -> None:
        self._store, self._cache, self._location = store, cache, location

    def read(self, name: str, max_bytes: int) -> bytes:
        with _answering(self._location):
            got = obstore.get(self._store, check_name(name))
            if got.meta["size"] > max_bytes:
                raise CorruptArtifact(f"{name} is no file of at most {max_bytes} bytes; restore it.")
            return bytes(got.bytes())

    def create(self, name: str, content: bytes) -> bool:
        with _answering(self._location):
            try:
                obstore.put(self._store, check_name(name), content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                # Its own first try may have succeeded unheard. `content` is the writer's alone, so equal means written.
                return bytes(obstore.get(self._store, name).bytes()) == content
        return True

    def exists(self, name: str) -> bool:
        with _answering(self._location):
            try:
                obstore.head(self._store, check_name(name))
            except FileNotFoundError:
                return False
        return True

    def names(self, folder: str) -> list[str]:
        with _answering(self._location):
            found = obstore.list_with_delimiter(self._store, check_name(folder))
        return [path.rpartition("/")[2] for path in (*(o["path"] for o in found["objects"]), *found["common_prefixes"])]

    def write_version(self, parent: str, write: Callable[[Path], None]) -> int:
        with self._draft() as draft:
            write(draft)
            write_checksums(draft)
            version = next_version(iter(self.names(parent)))
            while not self.create(f"{parent}/{version}/{_CLAIM}", uuid.uuid4().bytes):
                version += 1
            self._upload(draft, f"{parent}/{version}")
            return version

    def discard_version(self, name: str) -> None:
        with _answering(self._location):
            obstore.delete(self._store, f"{check_name(name)}/{CHECKSUMS}")

    def folder(self, name: str) -> Path:
        folder = self._cache / check_name(name)
        if not folder.is_dir():
            self._fetch(name, folder)
        return folder

    def fetched_again(self, name: str) -> Path:
        # Renamed first: whoever reads it at this moment keeps what it has.
        folder, away = self._cache / check_name(name), self._cache / f".damaged-{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            folder.rename(away)
            shutil.rmtree(away, ignore_errors=True)
        return self.folder(name)

    def _upload(self, draft: Path, name: str) -> None:
        files = [file for file in draft.rglob("*") if file.is_file() and file.name != CHECKSUMS]
        with _answering(self._location):

            def put(file: Path) -> None:
                obstore.put(self._store, f"{name}/{file.relative_to(draft).as_posix()}", file)

            with ThreadPoolExecutor(_TRANSFERS) as pool:
                list(pool.map(put, files))
            put(draft / CHECKSUMS)

    def _fetch(self, name: str, folder: Path) -> None:
        """Copy a version to `folder`, checked file by file and complete or absent."""
        content = self.read(f"{name}/{CHECKSUMS}", MAX_CHECKSUMS_BYTES)
        sums = parse_checksums(content, name)
        with self._draft() as draft, ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(lambda item: self._download(f"{name}/{item[0]}", draft / item[0], item[1]), sums.items()))
            (draft / CHECKSUMS).write_bytes(content)
            check_folder(draft, name)
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                draft.rename(folder)
            except OSError:
                # Another process of this machine was first; a version is the same whoever fetches it.
                if not folder.is_dir():
                    raise

    def _download(self, name: str, file: Path, expected: FileSum) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _answering(self._location):
            try:
                size = obstore.head(self._store, name)["size"]
            except FileNotFoundError:
                raise CorruptArtifact(f"{name} is missing from the bucket; restore it.") from None
            if size != expected.num_bytes:
                raise CorruptArtifact(f"{name} is not what was published; restore it.")
            with file.open("wb") as target:
                for start in range(0, size, _PIECE_BYTES):
                    end = min(size, start + _PIECE_BYTES)
                    target.write(obstore.get_range(self._store, name, start=start, end=end))

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        self._cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self._cache))
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _answering(location: str) -> Iterator[None]:
    """Say in our own words that the bucket did not answer; what it says itself may hold addresses and keys."""
    try:
        yield
    except BaseError as error:
        kind = type(error).__name__.removesuffix("Error")
        raise StorageUnavailable(
            f"The bucket {location} could not be used ({kind}); check its name, the credentials and the network."
        ) from error
