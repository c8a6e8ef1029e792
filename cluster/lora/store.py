"""Versioned folders that are complete or absent. Knows nothing of what is written into them.

`parent/1`, `parent/2`, ... each written beside its place and renamed into it: a reader never sees half a version,
and a version never changes afterwards.
"""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def write_version(parent: Path, write: Callable[[Path], None]) -> int:
    """Have `write` fill a new folder, then publish it as the next version below `parent` and return its number.

    Whatever goes wrong in `write` leaves `parent` as it was. Two writers at once get different numbers.
    """
    parent.mkdir(parents=True, exist_ok=True)
    draft = parent / f".draft-{uuid.uuid4().hex}"
    draft.mkdir()
    try:
        write(draft)
        for file in draft.rglob("*"):
            if file.is_file():
                sync(file)
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
