"""Versioned folders that are complete or absent. Knows nothing of what is written into them.

`parent/1`, `parent/2`, ... each written beside its place and renamed into it: a reader never sees half a version,
and a version never changes afterwards.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_version(parent: Path, write: Callable[[Path], None]) -> int:
    """Have `write` fill a new folder, then publish it as the next version below `parent` and return its number.

    Whatever goes wrong in `write` leaves `parent` as it was. Two writers at once get different numbers.
    """
    with _written_beside(parent, write) as draft:
        while True:
            version = max((int(f.name) for f in parent.iterdir() if f.name.isdecimal()), default=0) + 1
            try:
                draft.rename(parent / str(version))
            except OSError:
                if not (parent / str(version)).exists():
                    raise
                continue
            sync(parent)
            return version


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
    """A draft below `parent`, filled and on the disk, to be renamed; gone if anything goes wrong."""
    parent.mkdir(parents=True, exist_ok=True)
    draft = parent / f".draft-{uuid.uuid4().hex}"
    draft.mkdir()
    try:
        write(draft)
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
