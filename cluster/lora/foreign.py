"""An adapter that somebody hands in: a folder that PEFT saved, checked before and while it is read.

Two files are read, each once, and what is published is what was read. Whatever else lies there is left alone.
"""

import json
import os
import stat
from pathlib import Path

import numpy as np

from cluster.errors import CorruptArtifact, IncompatibleAdapter, InvalidInput
from cluster.lora.packed_adapter import CONFIG_FILE, MAX_ADAPTER_BYTES, OURS_FILE, TENSORS_FILE, PackedAdapter
from cluster.lora.safetensors_header import check_header

MAX_CONFIG_BYTES = 2**20
MAX_RANK = 1024

_FACTORS = (".lora_A.weight", ".lora_B.weight")
"""What the names of factors end in, as PEFT writes them."""


def read_handed_in(folder: Path, base_fingerprint: str) -> PackedAdapter:
    """The files of `folder`, whose limits they keep.

    Raises `InvalidInput` when a file is missing, a link, or too large, `CorruptArtifact` when the header of the tensors
    is not what it should be, and `IncompatibleAdapter` when the folder says that it belongs to another base.
    """
    config = _read(folder, CONFIG_FILE, MAX_CONFIG_BYTES)
    tensors = _read(folder, TENSORS_FILE, MAX_ADAPTER_BYTES)
    if (folder / OURS_FILE).exists():
        _check_base(_read(folder, OURS_FILE, MAX_CONFIG_BYTES), base_fingerprint)
    shapes = check_header(tensors, len(tensors)).shapes
    # What else there may be, such as whole modules or DoRA's magnitudes, `unpack` refuses by its name.
    for name, shape in ((name, shape) for name, shape in shapes.items() if name.endswith(_FACTORS)):
        rank = min(shape, default=0)
        if len(shape) != 2 or not 0 < rank <= MAX_RANK:
            raise IncompatibleAdapter(
                f"The adapter's {name[:200]} has the shape {shape}; expected a matrix of rank 1 to {MAX_RANK}."
            )
    try:
        config_json = config.decode()
    except UnicodeDecodeError as error:
        raise CorruptArtifact(f"{CONFIG_FILE} is no UTF-8; save the adapter again.") from error
    return PackedAdapter(config_json, base_fingerprint, np.frombuffer(tensors, dtype=np.uint8))


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    try:
        # Not through a link: it would publish whatever this process may read.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInput(
            f"{name} in {folder.name!r} cannot be read ({error.strerror}); expected a folder that PEFT saved, with "
            f"{CONFIG_FILE} and {TENSORS_FILE} in it."
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
            raise InvalidInput(f"{name} in {folder.name!r} is no file of at most {max_bytes} bytes.")
        # Not `max_bytes`: that much would be allocated first, whatever the file holds.
        return file.read(status.st_size)


def _check_base(content: bytes, base_fingerprint: str) -> None:
    try:
        named = json.loads(content)["base_fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtifact(
            f"{OURS_FILE} beside the adapter cannot be read ({error}); remove it, or restore it."
        ) from error
    if named != base_fingerprint:
        raise IncompatibleAdapter(
            f"The adapter was trained on base {named}, this is base {base_fingerprint}; "
            "train it on this base, or serve the other."
        )
