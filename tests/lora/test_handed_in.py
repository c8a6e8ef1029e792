"""Adapters that somebody hands in: limits before reading, nothing else is read, and all is kept bit for bit."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CorruptArtifact, IncompatibleAdapter, InvalidInput
from cluster.lora import foreign, peft_format
from cluster.lora.packed_adapter import pack, write_adapter
from cluster.lora.safetensors_header import MAX_HEADER_BYTES, check_header
from tests.lora.adapters import FINGERPRINT, random_adapter
from tests.model.nano import nano_model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "handed-in"
    folder.mkdir()
    peft_format.save(folder, random_adapter(nano_model(), dtype=torch.bfloat16), "base/1")
    return folder


def test_it_is_kept_byte_for_byte_and_nothing_else_is(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("notes")
    kept = tmp_path / "kept"
    kept.mkdir()
    given = foreign.read_handed_in(folder, FINGERPRINT)
    write_adapter(kept, given.config_json, given.base_fingerprint, given.tensors.data, {"note": 1})
    assert sorted(file.name for file in kept.iterdir()) == [CONFIG, TENSORS, "zephyra.json"]
    for name in (CONFIG, TENSORS):
        assert (kept / name).read_bytes() == (folder / name).read_bytes()
    assert pack(kept).base_fingerprint == FINGERPRINT


def test_one_that_peft_saved_has_no_fingerprint_and_one_of_another_base_has_its_own(folder: Path) -> None:
    with pytest.raises(IncompatibleAdapter, match=f"trained on base {FINGERPRINT}, this is base fedcba"):
        foreign.read_handed_in(folder, "fedcba9876543210")
    (folder / "zephyra.json").unlink()
    assert foreign.read_handed_in(folder, "fedcba9876543210").base_fingerprint == "fedcba9876543210"


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_links_pipes_and_large_files_are_not_read(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    with pytest.raises(InvalidInput, match=f"{name} in 'handed-in' cannot be read"):
        foreign.read_handed_in(folder, FINGERPRINT)
    (folder.parent / "elsewhere").write_bytes(content)
    os.symlink(folder.parent / "elsewhere", folder / name)
    with pytest.raises(InvalidInput, match=f"{name} in 'handed-in' cannot be read"):
        foreign.read_handed_in(folder, FINGERPRINT)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InvalidInput, match=f"{name} in 'handed-in' is no file"):
        foreign.read_handed_in(folder, FINGERPRINT)
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    limit = {CONFIG: "MAX_CONFIG_BYTES", TENSORS: "MAX_ADAPTER_BYTES"}[name]
    monkeypatch.setattr(foreign, limit, len(content) - 1)
    with pytest.raises(InvalidInput, match=f"at most {len(content) - 1} bytes"):
        foreign.read_handed_in(folder, FINGERPRINT)


@pytest.mark.parametrize("shape", [(2000, 2000), (4,), (2, 3, 4), (0, 4)])
def test_shapes_are_known_before_a_tensor_is_made(folder: Path, shape: tuple[int, ...]) -> None:
    safetensors.torch.save_file({"x.lora_A.weight": torch.zeros(shape)}, folder / TENSORS)
    with pytest.raises(IncompatibleAdapter, match="expected a matrix of rank 1 to 1024"):
        foreign.read_handed_in(folder, FINGERPRINT)


def _file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BAD_HEADERS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a length beyond the file": struct.pack("<Q", 100) + b"{}",
    "a length beyond all": struct.pack("<Q", 2**63) + b"{}",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00",
    "no JSON": _file(b"{"),
    "a list": _file([]),
    "a number": _file(7),
    "deep": _file(b"[" * 100_000),
    "no shape": _file({"x": {"dtype": "F32", "data_offsets": [0, 0]}}),
    "an unknown dtype": _file({"x": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "a negative side": _file({"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"1234"),
    "a huge side": _file({"x": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}}),
    "too few bytes": _file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
    "bytes beyond the file": _file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
    "bytes left over": _file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
    "a gap": _file({"x": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"12"),
    "an overlap": _file({n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in "xy"}, b"12"),
    "numbers that are none": _file({"x": {"dtype": "U8", "shape": [True], "data_offsets": [False, True]}}, b"1"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(case: str) -> None:
    content = BAD_HEADERS[case]
    with pytest.raises(CorruptArtifact):
        check_header(content, len(content))


def test_a_header_beyond_the_limit_is_not_parsed() -> None:
    with pytest.raises(CorruptArtifact, match=f"at most {MAX_HEADER_BYTES}"):
        check_header(struct.pack("<Q", MAX_HEADER_BYTES + 1), 2**40)


_SHAPES = st.dictionaries(st.text(max_size=8), st.lists(st.integers(0, 4), max_size=3), max_size=5)


@settings(deadline=None, max_examples=60)
@given(_SHAPES, st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_what_the_library_writes_is_read_as_it_is(shapes: dict[str, list[int]], dtype: torch.dtype) -> None:
    shapes.pop("__metadata__", None)
    content = safetensors.torch.save({n: torch.zeros(s, dtype=dtype) for n, s in shapes.items()}, {"note": "kept"})
    header = check_header(content, len(content))
    assert header.shapes == {name: tuple(shape) for name, shape in shapes.items()}
    assert header.metadata == {"note": "kept"}
