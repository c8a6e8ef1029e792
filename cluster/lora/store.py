"""Where artifacts lie: below a local folder or in a bucket, behind one interface. Knows nothing of what they hold.

Everything is written once. A file is created only if absent, and of several who create the same one wins; a version is
a folder of files that is complete or absent, and never changes.
"""

import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cluster.config.places import Root
from cluster.errors import CorruptArtifact, InvalidInput
from cluster.lora.checksums import CHECKSUMS, check_name, write_checksums


class Storage(Protocol):
    """One root. Names are paths below it, with slashes."""

    def read(self, name: str, max_bytes: int) -> bytes:
        """A whole file. Raises `FileNotFoundError`, or `CorruptArtifact` when it is longer than `max_bytes`."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it is there already; then False, and what is there stays."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def names(self, folder: str) -> list[str]:
        """The files and folders directly below `folder`, hidden ones left out; none if it is not there."""

    def write_version(self, parent: str, write: Callable[[Path], None]) -> int:
        """Have `write` fill a new folder, then publish it as the next version below `parent` and return its number.

        Whatever goes wrong in `write` leaves the root as it was. Two writers at once get different numbers.
        """

    def discard_version(self, name: str) -> None:
        """Make a version that was never in the catalog count as not written; its number is not given again."""

    def folder(self, name: str) -> Path:
        """The local folder of a version, on a bucket fetched on first use. Raises `FileNotFoundError`."""

    def fetched_again(self, name: str) -> Path:
        """The same after the local copy was found damaged; where there is no other, that one again."""


def open_storage(root: Root) -> Storage:
    """The storage of a folder, or of a URI: file://, s3://, gs:// or az://. Raises `InvalidInput` for another."""
    if isinstance(root, Path):
        return LocalStorage(root)
    scheme, separator, rest = root.partition("://")
    if not separator:
        return LocalStorage(Path(root))
    if scheme == "file":
        return LocalStorage(Path("/") / rest.lstrip("/"))
    if scheme not in ("s3", "gs", "az"):
        raise InvalidInput(
            f"The root {root!r} is neither a folder nor a bucket: expected file, s3, gs or az before ://."
        )
    # Here, so that a root on this machine does not pay for importing the library.
    from cluster.lora.bucket import open_bucket

    return open_bucket(root)


class LocalStorage:
    """A folder on this machine, or on a file system that several share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, name: str) -> Path:
        """The path of `name`. Raises `CorruptArtifact` if a link on its way leads out of the root."""
        path = self._root / check_name(name)
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise CorruptArtifact(f"{name} is a link out of the root; put the files themselves there.")
        return path

    def read(self, name: str, max_bytes: int) -> bytes:
        # Without waiting: a pipe in a file's place would have no end of it.
        with open(os.open(self.path(name), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
                raise CorruptArtifact(f"{name} is no file of at most {max_bytes} bytes; restore it.")
            # Not `max_bytes`: that much would be allocated first.
            return file.read(status.st_size)

    def create(self, name: str, content: bytes) -> bool:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f".draft-{uuid.uuid4().hex}"
        try:
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # Fails on an existing name, also between machines on a shared file system.
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        sync(path.parent)
        return True

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def names(self, folder: str) -> list[str]:
        path = self.path(folder)
        return [entry for entry in os.listdir(path) if not entry.startswith(".")] if path.is_dir() else []

    def write_version(self, parent: str, write: Callable[[Path], None]) -> int:
        return write_version(self.path(parent), write)

    def discard_version(self, name: str) -> None:
        (self.path(name) / CHECKSUMS).unlink()

    def folder(self, name: str) -> Path:
        path = self.path(name)
        if not path.is_dir():
            raise FileNotFoundError(2, "No such version", name)
        return path

    def fetched_again(self, name: str) -> Path:
        return self.folder(name)


def write_version(parent: Path, write: Callable[[Path], None]) -> int:
    """`Storage.write_version` below a local folder."""
    with _written_beside(parent, write) as draft:
        while True:
            version = next_version(entry.name for entry in parent.iterdir())
            try:
                draft.rename(parent / str(version))
            except OSError:
                if not (parent / str(version)).exists():
                    raise
                continue
            sync(parent)
            return version


def next_version(names: Iterator[str]) -> int:
    """One more than the largest number among `names`."""
    return max((int(name) for name in names if name.isdecimal()), default=0) + 1


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder, then publish it as `folder`. Raises `FileExistsError` if that is there already.

    Whatever goes wrong in `write` leaves no trace.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    with _written_beside(folder.parent, write) as draft:
        # A folder that another writer published meanwhile is not empty, and is not replaced.
        draft.rename(folder)
        sync(folder.parent)


@contextmanager
def _written_beside(parent: Path, write: Callable[[Path], None]) -> Iterator[Path]:
    """A draft below `parent`, filled, with its checksums and on the disk, to be renamed; gone if anything fails."""
    parent.mkdir(parents=True, exist_ok=True)
    draft = parent / f".draft-{uuid.uuid4().hex}"
    draft.mkdir()
    try:
        write(draft)
        write_checksums(draft)
        for file in draft.rglob("*"):
            if file.is_file():
                sync(file)
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
