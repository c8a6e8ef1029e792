"""An adapter as its files' own bytes: what a shard holds and hands out. Knows nothing of torch, or what they mean.

The tensors' file is mapped, not read: its pages are the operating system's, which takes them back when they are not in
use. A version never changes once it is published, and so neither does what is mapped.
"""

import errno
import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import AdapterUnavailable, CorruptArtifact

CONFIG_FILE, TENSORS_FILE, OURS_FILE = "adapter_config.json", "adapter_model.safetensors", "zephyra.json"
"""The two that PEFT writes, and ours with the base's fingerprint and the checksum."""

MAX_ADAPTER_BYTES = 4 * 2**30

_OUT_OF_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Nothing is wrong with the files then."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter as its files' own bytes: what travels from shard to replica, bit for bit, without torch."""

    config_json: str
    base_fingerprint: str
    tensors: NDArray[np.uint8]
    """The safetensors file; not to be written to."""

    @property
    def num_bytes(self) -> int:
        """Of the tensors, beside which the rest is nothing."""
        return self.tensors.nbytes


def pack(folder: Path) -> PackedAdapter:
    """Map an adapter's files and check them: sizes, checksum. Raises `CorruptArtifact`."""
    try:
        ours = json.loads((folder / OURS_FILE).read_text())
        config_json = (folder / CONFIG_FILE).read_text()
        size = (folder / TENSORS_FILE).stat().st_size
        if size > MAX_ADAPTER_BYTES:
            raise CorruptArtifact(f"The adapter in {folder.name} has {size} bytes; the most is {MAX_ADAPTER_BYTES}.")
        tensors = _mapped(folder / TENSORS_FILE)
        if hashlib.sha256(tensors.data).hexdigest() != ours["sha256"]:
            raise CorruptArtifact(
                f"The adapter in {folder.parent.name}/{folder.name} is not what was published; restore it."
            )
        return PackedAdapter(config_json, ours["base_fingerprint"], tensors)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in _OUT_OF_ROOM:
            raise AdapterUnavailable(
                f"The adapter in {folder.parent.name}/{folder.name} cannot be mapped: {error.strerror}; raise the "
                "limit of open files or memory of this process, or lower what it keeps."
            ) from error
        # An OSError's own text names the path, which is nobody's business outside.
        why = error.strerror if isinstance(error, OSError) else error
        raise CorruptArtifact(f"The adapter in {folder.parent.name}/{folder.name} cannot be read: {why}.") from error


def write_adapter(
    folder: Path, config_json: str, base_fingerprint: str, tensors: bytes | memoryview, metadata: Any
) -> None:
    """Write what `pack` reads into `folder`, byte for byte. `metadata` (JSON) is kept for people."""
    (folder / TENSORS_FILE).write_bytes(tensors)
    (folder / CONFIG_FILE).write_text(config_json)
    ours = {"base_fingerprint": base_fingerprint, "sha256": hashlib.sha256(tensors).hexdigest()}
    (folder / OURS_FILE).write_text(json.dumps({**ours, "metadata": metadata}, indent=2))


def _mapped(file: Path) -> NDArray[np.uint8]:
    """A read-only view of the whole file. No `np.memmap`: a subclass would be copied into its pickle."""
    with file.open("rb") as opened:
        return np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
