"""What a shard holds: the file itself, mapped; nothing that could be written to, and no copy of it anywhere."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from cluster.lora import peft_format
from cluster.lora.packed_adapter import pack
from tests.lora.adapters import random_adapter
from tests.model.nano import nano_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    peft_format.save(tmp_path, random_adapter(nano_model()), "base/1")
    return tmp_path


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_packed_adapter_is_its_file_mapped_for_as_long_as_it_is_held(folder: Path) -> None:
    packed = pack(folder)
    assert str(folder) in mapped_files()
    assert packed.tensors.tobytes() == (folder / "adapter_model.safetensors").read_bytes()
    del packed
    assert str(folder) not in mapped_files()


def test_a_packed_adapter_cannot_be_written_to(folder: Path) -> None:
    packed = pack(folder)
    with pytest.raises(ValueError, match="read-only"):
        packed.tensors[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        packed.tensors.flags.writeable = True


def test_its_pickle_takes_the_bytes_out_of_band_and_leaves_them_read_only(folder: Path) -> None:
    """As Ray's object store takes them: what is in the pickle itself would be copied in and out."""
    packed = pack(folder)
    buffers: list[pickle.PickleBuffer] = []
    in_band = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    assert sum(buffer.raw().nbytes for buffer in buffers) == packed.num_bytes
    assert len(in_band) < 2000 + len(packed.config_json)
    back = pickle.loads(in_band, buffers=buffers)
    assert np.shares_memory(back.tensors, packed.tensors)
    assert not back.tensors.flags.writeable
