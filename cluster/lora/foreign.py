"""An adapter that somebody hands in: a folder that PEFT saved, checked before and while it is read.

Two files are read, each once, and what is published is what was read. Whatever else lies there is left alone.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import CorruptArtifact, IncompatibleAdapter, InvalidInput
from cluster.lora.packed_adapter import MAX_ADAPTER_BYTES, PackedAdapter
from cluster.lora.safetensors_header import check_header

MAX_CONFIG_BYTES = 2**20
MAX_RANK = 1024

_CONFIG, _TENSORS, _OURS = "adapter_config.json", "adapter_model.safetensors", "zephyra.json"


def read_handed_in(folder: Path, base_fingerprint: str) -> PackedAdapter:
    """The files of `folder`, whose limits they keep.

    Raises `InvalidInput` when a file is missing, a link, or too large, `CorruptArtifact` when the header of the tensors
    is not what it should be, and `IncompatibleAdapter` when the folder says that it belongs to another base.
    """
    config = _read(folder, _CONFIG, MAX_CONFIG_BYTES)
    tensors = _read(folder, _TENSORS, MAX_ADAPTER_BYTES)
    if (folder / _OURS).exists():
        _check_base(_read(folder, _OURS, MAX_CONFIG_BYTES), base_fingerprint)
    for name, shape in check_header(tensors, len(tensors)).shapes.items():
        rank = min(shape, default=0)
        if len(shape) != 2 or not 0 < rank <= MAX_RANK:
            raise IncompatibleAdapter(
                f"The adapter's {name[:200]} has the shape {shape}; expected a matrix of rank 1 to {MAX_RANK}."
            )
    try:
        config_json = config.decode()
    except UnicodeDecodeError as error:
        raise CorruptArtifact(f"{_CONFIG} is no UTF-8; save the adapter again.") from error
    return PackedAdapter(config_json, base_fingerprint, np.frombuffer(tensors, dtype=np.uint8))


def write_handed_in(folder: Path, packed: PackedAdapter, metadata: dict[str, Any]) -> None:
    """Write the adapter into `folder`, byte for byte, with what `pack` looks for. `metadata` is kept for people."""
    (folder / _TENSORS).write_bytes(packed.tensors.data)
    (folder / _CONFIG).write_text(packed.config_json)
    ours = {"base_fingerprint": packed.base_fingerprint, "sha256": hashlib.sha256(packed.tensors.data).hexdigest()}
    (folder / _OURS).write_text(json.dumps({**ours, "metadata": metadata}, indent=2))


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    try:
        # Not through a link: it would publish whatever this process may read.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInput(
            f"{name} in {folder.name!r} cannot be read ({error.strerror}); expected a folder that PEFT saved, with "
            f"{_CONFIG} and {_TENSORS} in it."
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
            raise InvalidInput(f"{name} in {folder.name!r} is no file of at most {max_bytes} bytes.")
        return file.read(max_bytes)


def _check_base(content: bytes, base_fingerprint: str) -> None:
    try:
        named = json.loads(content)["base_fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtifact(
            f"{_OURS} beside the adapter cannot be read ({error}); remove it, or restore it."
        ) from error
    if named != base_fingerprint:
        raise IncompatibleAdapter(
            f"The adapter was trained on base {named}, this is base {base_fingerprint}; "
            "train it on this base, or serve the other."
        )
