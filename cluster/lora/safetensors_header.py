"""What a safetensors file says of itself, checked against limits before any of its tensors is read.

The format: eight bytes with the header's length, the header in JSON, the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format").
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import CorruptArtifact

MAX_HEADER_BYTES = 2**24
MAX_TENSORS = 65_536
MAX_SIDE = 2**24

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class Header:
    """Names, shapes and what the writer noted."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def check_header(start: bytes, num_bytes: int) -> Header:
    """The header of a file of `num_bytes` that begins with `start`: at least eight bytes and the header.

    Raises `CorruptArtifact` unless the tensors fill the rest of the file exactly, within the limits.
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(MAX_HEADER_BYTES, num_bytes - 8) or length > len(start) - 8:
        raise CorruptArtifact(
            f"The safetensors file has {num_bytes} bytes and a header of {length}; expected at most {MAX_HEADER_BYTES}."
        )
    try:
        content: dict[str, Any] = json.loads(start[8 : 8 + length])
        metadata = {str(key): str(value) for key, value in content.pop("__metadata__", {}).items()}
        if len(content) > MAX_TENSORS:
            raise ValueError(f"{len(content)} tensors; the most is {MAX_TENSORS}")
        spans = sorted(_span(name, entry) for name, entry in content.items())
        end = 0
        for first, last in spans:
            if first != end:
                raise ValueError("tensors overlap or leave a gap")
            end = last
        if end != num_bytes - 8 - length:
            raise ValueError(f"tensors of {end} bytes; there are {num_bytes - 8 - length}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptArtifact(f"The header of the safetensors file cannot be read: {error}.") from error
    return Header({name: tuple(entry["shape"]) for name, entry in content.items()}, metadata)


def _span(name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    first, last = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(side) is int and 0 <= side <= MAX_SIDE for side in shape):
        raise ValueError(f"{name} has the shape {shape}; the longest side is {MAX_SIDE}")
    if (
        type(first) is not int
        or type(last) is not int
        or last - first != math.prod(shape) * _ITEM_BYTES[entry["dtype"]]
    ):
        raise ValueError(f"{name} has {entry['dtype']} {shape} between {first} and {last}")
    return first, last
