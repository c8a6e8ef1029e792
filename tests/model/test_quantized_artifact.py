"""A quantized base on disk: it comes back bit for bit, without its floats, and nothing else is taken for it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.errors import CorruptArtifact, InvalidInput, NotTrained
from cluster.lora.weights import adaptable_layers
from cluster.model.base import fingerprint, load_base, quantize_base
from cluster.model.quantization import quantize_model
from cluster.model.quantized_artifact import load_quantized, quantized_folder, read_manifest
from cluster.model.tokenizer import train_tokenizer
from tests.model.nano import logits, nano_model
from tests.model.shapes import ARCHITECTURES, VOCABULARY, small_model, with_dequantized_weights

TENSORS, OURS = "quantized.safetensors", "quantization.json"


def _saved(folder: Path, architecture: str = "zephyra", tied: bool = True) -> Path:
    small_model(architecture, tied).save_pretrained(folder)
    tokenizer = train_tokenizer(["the quick brown fox"], vocab_size=300, max_length_tokens=160)
    tokenizer.save_pretrained(folder)
    return folder


def _quantized(source: Path, quantization: str) -> Path:
    folder = quantized_folder(source, quantization)
    folder.mkdir()
    quantize_base(source, folder, quantization)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quantized base beside its floats."""
    return _quantized(_saved(tmp_path / "base" / "1"), "int4")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_it_comes_back_bit_for_bit(tmp_path: Path, architecture: str, tied: bool, quantization: str) -> None:
    source = _saved(tmp_path / "7", architecture, tied)
    folder = _quantized(source, quantization)
    assert folder == tmp_path / f"7-{quantization}"
    plain, base = load_base(source), load_base(folder)
    assert (base.fingerprint, base.name) == (plain.fingerprint, f"7-{quantization}")
    assert (base.num_parameters, base.context_tokens) == (plain.num_parameters, 160)
    assert base.model.generation_config.to_dict() == plain.model.generation_config.to_dict()
    assert base.tokenizer("the quick fox").input_ids == plain.tokenizer("the quick fox").input_ids
    assert not base.model.training
    assert list(adaptable_layers(base.model)) == list(adaptable_layers(plain.model))

    expected = small_model(architecture, tied)
    quantize_model(expected, quantization)
    got = base.model.state_dict()
    assert got.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert (got[name].dtype, got[name].requires_grad) == (tensor.dtype, False)
        assert torch.equal(got[name], tensor), name
    ids_BT = torch.randint(VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(1))
    expected_BTV = logits(with_dequantized_weights(plain.model, base.model), ids_BT)
    torch.testing.assert_close(logits(base.model, ids_BT), expected_BTV, rtol=1e-4, atol=1e-4)


def test_in_bf16_it_is_the_same_integers(folder: Path) -> None:
    wide, narrow = load_base(folder).model, load_base(folder, torch.bfloat16).model
    assert narrow.dtype == torch.bfloat16
    for name, tensor in narrow.state_dict().items():
        wanted = wide.state_dict()[name]
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name
        if name.endswith(".scales"):
            assert torch.equal(tensor.float(), wanted), "a scale is exactly a bf16 number"
    with pytest.raises(InvalidInput, match=r"asked for in torch\.float16"):
        load_base(folder, torch.float16)


class _LargestFloat(TorchDispatchMode):
    """Notes the most numbers of any tensor of floats in memory while it is on."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.most = max(self.most, tensor.numel())
        return out


def test_loading_holds_no_matrix_of_floats(folder: Path) -> None:
    with _LargestFloat() as quantized:
        load_quantized(folder, torch.float32)
    with _LargestFloat() as plain:
        small_model("zephyra", tied=True)
    assert plain.most >= VOCABULARY * 64
    # The largest of all: one scale for each of the vocabulary's rows.
    assert quantized.most == VOCABULARY


def _flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)


def _cut(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])


def _without_tensors(folder: Path) -> None:
    (folder / TENSORS).unlink()


def _of_a_wider_model(folder: Path) -> None:
    _change_json(folder / "config.json", intermediate_size=128)


def _of_a_deeper_model(folder: Path) -> None:
    _change_json(folder / "config.json", num_hidden_layers=3)


def _of_another_quantization(folder: Path) -> None:
    _change_json(folder / OURS, quantization="int8")


def _of_no_quantization(folder: Path) -> None:
    _change_json(folder / OURS, quantization="int3")


def _of_a_later_format(folder: Path) -> None:
    _change_json(folder / OURS, format=2)


def _with_a_list_for_a_manifest(folder: Path) -> None:
    (folder / OURS).write_text("[]")


def _with_scales_of_integers(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    name = "model.embed_tokens.matrix.scales"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / TENSORS)
    _sign(folder)


def _with_a_head_of_its_own(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    values = tensors["model.embed_tokens.matrix.values"].clone()
    save_file({**tensors, "lm_head.matrix.values": values}, folder / TENSORS)
    _sign(folder)


def _not_safetensors(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"\x80\x04K\x01.")
    _sign(folder)


def _sign(folder: Path) -> None:
    _change_json(folder / OURS, sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())


def _change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip_a_bit, "are not what was written"),
        (_cut, "are not what was written"),
        (_without_tensors, "No such file"),
        (_of_a_wider_model, r"expected floats \(64, 4\)"),
        (_of_a_deeper_model, r"lacks model\.layers\.2\."),
        (_of_another_quantization, r"expected floats \(64,\)"),
        (_of_no_quantization, "there is no quantization 'int3'"),
        (_of_a_later_format, "expected format 1"),
        (_with_a_list_for_a_manifest, r"has no quantization\.json that can be read"),
        (_with_scales_of_integers, r"scales of the quantized base '1-int4' is torch\.int8"),
        (_with_a_head_of_its_own, r"has a strange lm_head\.matrix\.values"),
        (_not_safetensors, "cannot be read"),
    ],
)
def test_what_is_damaged_or_foreign_is_refused(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    load_base(folder)
    damage(folder)
    with pytest.raises(CorruptArtifact, match=f"(?s){said}.*quantize the base again") as raised:
        load_base(folder)
    assert str(folder.parent) not in str(raised.value)


def test_what_cannot_be_quantized_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidInput, match="'1-int4' is quantized already"):
        quantize_base(folder, empty, "int8")
    with pytest.raises(NotTrained, match=r"name a folder with a config\.json"):
        quantize_base(tmp_path, empty, "int8")
    assert not list(empty.iterdir())


def test_the_fingerprint_is_of_the_floats_and_weights_stay_behind(folder: Path) -> None:
    source = folder.with_name("1")
    assert read_manifest(folder).base_fingerprint == fingerprint(source)
    shutil.rmtree(source)
    assert load_base(folder).model.num_parameters() < nano_model().num_parameters()
    assert not list(folder.glob("model*.safetensors"))
