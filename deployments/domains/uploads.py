"""Files that clients are sending, in folders of this process's own until what they are for is done or given up."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InvalidInput, Overloaded, PublisherUnavailable, UploadTooLarge
from cluster.lora.packed_adapter import CONFIG_FILE, OURS_FILE, TENSORS_FILE
from cluster.router.examples import EXAMPLES_FILE

EXAMPLES_JSON, EXAMPLES_TEXT = EXAMPLES_FILE, "examples.txt"
FILE_OF_FIELD = {"adapter_config": CONFIG_FILE, "adapter_model": TENSORS_FILE, "zephyra": OURS_FILE}
"""What both wires call the files of an adapter."""

FILES = (*FILE_OF_FIELD.values(), EXAMPLES_JSON, EXAMPLES_TEXT)
"""What may be uploaded of a domain."""

MAX_OPEN = 8
IDLE_S = 600.0
"""An upload to which nothing is added for so long is given up: its client, or the Gateway before it, is gone."""

_PREFIX = "zephyra-uploads-"
_FOLDER = "upload"
_YOUNG_S = 60.0


@dataclass(slots=True)
class _Upload:
    folder: Path
    num_bytes: int
    touched_s: float


class Uploads:
    """The uploads that are open. Not for several threads at once."""

    def __init__(self, max_bytes: int, max_open: int = MAX_OPEN, idle_s: float = IDLE_S) -> None:
        self._max_bytes, self._max_open, self._idle_s = max_bytes, max_open, idle_s
        self._uploads: dict[str, _Upload] = {}
        _remove_abandoned(Path(tempfile.gettempdir()))
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Held until this process ends, in whatever way: then the next one may remove the folder.
        self._lock = os.open(self._folder, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def open(self) -> str:
        """The name of a new upload. Raises `Overloaded` while too many are under way."""
        now_s = time.monotonic()
        for name, upload in list(self._uploads.items()):
            if now_s - upload.touched_s > self._idle_s:
                self.discard(name)
        if len(self._uploads) >= self._max_open:
            raise Overloaded(f"{self._max_open} uploads are under way, which is the most; try again in a moment.")
        name = uuid.uuid4().hex
        folder = self._folder / name / _FOLDER
        folder.mkdir(parents=True)
        self._uploads[name] = _Upload(folder, 0, now_s)
        return name

    def write(self, name: str, file: str, chunk: bytes) -> None:
        """Append to one of the `FILES`. Raises `UploadTooLarge` beyond the limit of all of them together."""
        upload = self._open_upload(name)
        if file not in FILES:
            raise InvalidInput(f"{file[:100]!r} is no file of a domain; upload {', '.join(FILES)}.")
        upload.num_bytes += len(chunk)
        upload.touched_s = time.monotonic()
        if upload.num_bytes > self._max_bytes:
            raise UploadTooLarge(
                f"The upload is larger than {self._max_bytes} bytes, which is the most; raise the setting upload_bytes."
            )
        with (upload.folder / file).open("ab") as target:
            target.write(chunk)

    def folder(self, name: str) -> Path:
        """Where the files of an upload are."""
        return self._open_upload(name).folder

    def discard(self, name: str) -> None:
        """Remove an upload and its files. One that is gone already is no error."""
        if (upload := self._uploads.pop(name, None)) is not None:
            shutil.rmtree(upload.folder.parent, ignore_errors=True)

    def close(self) -> None:
        """Remove all of them."""
        self._uploads.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    def _open_upload(self, name: str) -> _Upload:
        if (upload := self._uploads.get(name)) is None:
            raise PublisherUnavailable(
                "The upload is gone: it was idle too long, or the publisher is new; send it again."
            )
        return upload


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that were killed: those that nobody holds."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with _unlocked(folder) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _unlocked(folder: Path) -> Iterator[bool]:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        status = os.fstat(descriptor)
        # A young one may be about to be locked by who made it.
        is_old = time.time() - status.st_mtime > _YOUNG_S
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield is_old and status.st_uid == os.getuid()
            return
        yield False
    finally:
        os.close(descriptor)
