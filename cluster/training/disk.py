"""A full disk, said in a sentence, whichever library met it."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cluster.errors import DiskFull
from cluster.training.run import Run

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left; the user's quota is used up; a file may not grow further."""


@contextmanager
def full_disk_told(root: Path, run: Run) -> Iterator[None]:
    """Raise `DiskFull` where what goes on inside finds no room.

    What is published is written beside its place first, so that the catalog is what it was.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        kept = "the newest checkpoint is kept" if run.restore() is not None else "there was no checkpoint yet"
        free_mb = shutil.disk_usage(root).free / 1e6
        raise DiskFull(
            f"There is no room left to write ({error}; {free_mb:,.1f} MB are free in {root}). The catalog is as it "
            f"was, and {kept}: make room and start the same run again, which goes on from there."
        ) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    # safetensors passes the number on in its text alone.
    return any(f"os error {number})" in str(error) for number in _FULL)
