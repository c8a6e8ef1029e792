"""Adapters of PEFT here and ours in PEFT: the same logits; and everything that cannot be mixed exactly is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from cluster.errors import CorruptArtifact, IncompatibleAdapter, InvalidInput
from cluster.lora import peft_format
from cluster.lora.foreign import read_handed_in
from cluster.lora.packed_adapter import PackedAdapter, pack
from cluster.lora.weights import AdapterWeights, Factors, adaptable_layers
from tests.lora.adapters import FINGERPRINT, mixed_logits, random_adapter
from tests.model.nano import logits, nano_model, random_ids

_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]

EXACT: dict[str, dict[str, Any]] = {
    "every layer": {"target_modules": "all-linear", "r": 4, "lora_alpha": 8},
    "rank-stabilised": {"target_modules": _ALL, "r": 9, "lora_alpha": 6, "use_rslora": True},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "r": 3, "layers_to_transform": [1]},
    "ranks and alphas by suffix": {
        "target_modules": _ALL,
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 2, "mlp.down_proj": 7},
        "alpha_pattern": {"k_proj": 10, "self_attn.q_proj": 3},
    },
    "alphas by regular expression, the first that fits": {
        "target_modules": _ALL,
        "r": 4,
        "alpha_pattern": {r"layers\.0\..*": 12, r"(q|k)_proj": 2, "q_proj": 30, r"^model.layers.1.mlp.up_proj": 5},
    },
    "gaussian start": {"target_modules": _ALL, "r": 2, "init_lora_weights": "gaussian"},
}


def _peft_model(base: torch.nn.Module, seed: int = 0, **config: Any) -> PeftModel:
    """A copy of `base` under PEFT, with random non-zero A and B."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("feed_forward", ["relu2", "swiglu"])
@pytest.mark.parametrize("case", EXACT)
def test_an_adapter_that_peft_saved_answers_here_as_it_does_there(tmp_path: Path, case: str, feed_forward: str) -> None:
    base = nano_model(feed_forward=feed_forward)
    _peft_model(base, **EXACT[case]).save_pretrained(tmp_path)
    # Not the model that was saved: PEFT sorts the patterns as it writes them, so that another may be the first to fit.
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ours = peft_format.unpack(read_handed_in(tmp_path, FINGERPRINT), torch.float32)
    ours.check_fits(adaptable_layers(base), FINGERPRINT)
    ids_BT = random_ids(base, 2, 9)
    expected_BTV = logits(theirs, ids_BT)
    assert (expected_BTV - logits(base, ids_BT)).abs().max() > 0.1, "the adapter was meant to matter"
    torch.testing.assert_close(mixed_logits(base, ours, ids_BT), expected_BTV, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_peft_trained_answers_here_as_it_does_there(tmp_path: Path) -> None:
    base = nano_model()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    ids_BT = random_ids(base, 4, 12)
    losses = []
    for _ in range(8):
        loss = theirs(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1, losses
    theirs.save_pretrained(tmp_path)
    got_BTV = mixed_logits(base, peft_format.unpack(read_handed_in(tmp_path, FINGERPRINT), torch.float32), ids_BT)
    torch.testing.assert_close(got_BTV, logits(theirs.eval(), ids_BT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [(4,), (1, 5, 3)])
def test_an_adapter_of_ours_answers_in_peft_as_it_does_here(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    base = nano_model(feed_forward="swiglu")
    ours = random_adapter(base, ranks)
    peft_format.save(tmp_path, ours, "base/1")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ids_BT = random_ids(base, 2, 9)
    torch.testing.assert_close(logits(theirs, ids_BT), mixed_logits(base, ours, ids_BT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_packing_keep_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    ours = random_adapter(nano_model(), (4, 2), dtype=dtype)
    peft_format.save(tmp_path, ours, "base/1", {"note": "kept for people"})
    got = peft_format.unpack(pack(tmp_path), dtype)
    assert got.base_fingerprint == FINGERPRINT
    assert got.num_bytes == ours.num_bytes
    assert list(got.factors) == sorted(ours.factors)
    for name, factors in ours.factors.items():
        other = got.factors[name]
        assert other.a_RI.dtype == other.b_OR.dtype == dtype
        assert torch.equal(other.a_RI, factors.a_RI)
        assert torch.equal(other.b_OR, factors.b_OR)
        assert other.scale == pytest.approx(factors.scale, rel=1e-15)
    assert json.loads((tmp_path / "zephyra.json").read_text())["metadata"] == {"note": "kept for people"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "all"}, "bias"),
    "biases of B": ({"lora_bias": True}, "lora_bias"),
    "whole modules": ({"modules_to_save": ["norm"]}, "modules_to_save"),
    "token embeddings": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "an embedding's factors": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding"),
    "PiSSA, which moves the base": ({"init_lora_weights": "pissa"}, "pissa"),
    "OLoRA, which moves the base": ({"init_lora_weights": "olora"}, "olora"),
    "invocation tokens": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of some of these itself
@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_saved_and_no_mixture_could_be_exact_for_is_refused(tmp_path: Path, case: str) -> None:
    config, named = REFUSED[case]
    _peft_model(nano_model(), **{"target_modules": ["q_proj"], "r": 2, **config}).save_pretrained(tmp_path)
    with pytest.raises(IncompatibleAdapter, match=named):
        peft_format.unpack(read_handed_in(tmp_path, FINGERPRINT), torch.float32)


def test_an_adapter_of_another_base_or_shape_is_refused() -> None:
    base = nano_model()
    layers = adaptable_layers(base)
    good = random_adapter(base)
    good.check_fits(layers, FINGERPRINT)
    with pytest.raises(IncompatibleAdapter, match=f"{FINGERPRINT}, this is base fedcba"):
        good.check_fits(layers, "fedcba9876543210")
    name = "model.layers.0.self_attn.q_proj"
    a_RI, b_OR = good.factors[name].a_RI, good.factors[name].b_OR
    for bad in (Factors(a_RI[:, 1:], b_OR, 1.0), Factors(a_RI, b_OR[1:], 1.0), Factors(a_RI, b_OR[:, 1:], 1.0)):
        with pytest.raises(IncompatibleAdapter, match=r"q_proj.*the layer needs A \(r, 64\), B \(64, r\)"):
            AdapterWeights({**good.factors, name: bad}, FINGERPRINT).check_fits(layers, FINGERPRINT)
    with pytest.raises(IncompatibleAdapter, match=r"layers\.9\.mlp\.up_proj, which this base does not have"):
        AdapterWeights({"model.layers.9.mlp.up_proj": good.factors[name]}, FINGERPRINT).check_fits(layers, FINGERPRINT)


def _repack(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> PackedAdapter:
    """A small well-formed adapter, after `change` has had its way with configuration and tensors."""
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    tensors = {f"base_model.model.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    change(config, tensors)
    data = np.frombuffer(safetensors.torch.save(tensors), dtype=np.uint8)
    return PackedAdapter(json.dumps(config), FINGERPRINT, data)


_A = "base_model.model.x.lora_A.weight"
MALFORMED: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], type[Exception], str]] = {
    "NaN": (lambda _, t: t[_A].fill_(torch.nan), CorruptArtifact, "NaN or infinity"),
    "infinity": (lambda _, t: t[_A].fill_(torch.inf), CorruptArtifact, "NaN or infinity"),
    "a scale that is NaN": (lambda c, _: c.update(lora_alpha=float("nan")), CorruptArtifact, "scale for x is nan"),
    "no alpha": (lambda c, _: c.pop("lora_alpha"), CorruptArtifact, "lora_alpha"),
    "alpha as text": (lambda c, _: c.update(lora_alpha="8"), CorruptArtifact, "PEFT's layout"),
    "a broken pattern": (
        lambda c, _: c.update(alpha_pattern={"(": 1}),
        IncompatibleAdapter,
        "expected names of layers",
    ),
    "a pattern that never ends": (
        lambda c, _: c.update(alpha_pattern={r"(\w+\w*)+!": 1}),
        IncompatibleAdapter,
        "expected names of layers",
    ),
    "choices of choices": (
        lambda c, _: c.update(alpha_pattern={"(a|a)" * 40: 1}),
        IncompatibleAdapter,
        "2 choices such as",
    ),
    "a pattern without an end": (
        lambda c, _: c.update(alpha_pattern={"a" * 300: 1}),
        IncompatibleAdapter,
        "at most 256 characters",
    ),
    "patterns and patterns": (
        lambda c, _: c.update(alpha_pattern={f"layers.{n}.*": 1 for n in range(17)}),
        IncompatibleAdapter,
        "holds 17 patterns",
    ),
    "another method": (lambda c, _: c.update(peft_type="IA3"), IncompatibleAdapter, "'IA3'"),
    "no B": (lambda _, t: t.pop(_A.replace("_A", "_B")), CorruptArtifact, "no B for x"),
    "no A": (lambda _, t: t.pop(_A), IncompatibleAdapter, "lora_B"),
    "nothing": (lambda _, t: t.clear(), IncompatibleAdapter, "no factors at all"),
    "rank 0": (lambda _, t: t.update({_A: torch.ones(0, 2)}), IncompatibleAdapter, r"\(0, 2\)"),
    "a number for a matrix": (lambda _, t: t.update({_A: torch.ones(())}), IncompatibleAdapter, "two matrices"),
    "a convolution": (lambda _, t: t.update({_A: torch.ones(2, 2, 1, 1)}), IncompatibleAdapter, "two matrices"),
    "whole numbers": (lambda _, t: t.update({_A: t[_A].to(torch.int8)}), IncompatibleAdapter, "torch.int8"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_adapter_is_refused(case: str) -> None:
    change, error, named = MALFORMED[case]
    peft_format.unpack(_repack(lambda config, tensors: None), torch.float32)
    with pytest.raises(error, match=named):
        peft_format.unpack(_repack(change), torch.float32)


def test_any_flipped_byte_of_the_factors_is_noticed(tmp_path: Path) -> None:
    peft_format.save(tmp_path, random_adapter(nano_model()), "base/1")
    file = tmp_path / "adapter_model.safetensors"
    good = file.read_bytes()
    for position in (0, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(CorruptArtifact, match="is not what was published"):
            pack(tmp_path)
    file.write_bytes(good[:-1])
    with pytest.raises(CorruptArtifact, match="is not what was published"):
        pack(tmp_path)
    file.write_bytes(good)
    pack(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "zephyra.json"])
def test_a_missing_file_is_refused_without_its_path(tmp_path: Path, name: str) -> None:
    peft_format.save(tmp_path, random_adapter(nano_model()), "base/1")
    (tmp_path / name).unlink()
    with pytest.raises(CorruptArtifact, match="cannot be read: No such file") as caught:
        pack(tmp_path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"7", b"\xff\xfe"])
def test_a_damaged_companion_file_is_refused(tmp_path: Path, content: bytes) -> None:
    peft_format.save(tmp_path, random_adapter(nano_model()), "base/1")
    (tmp_path / "zephyra.json").write_bytes(content)
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        pack(tmp_path)


def test_a_damaged_configuration_of_peft_is_refused(tmp_path: Path) -> None:
    peft_format.save(tmp_path, random_adapter(nano_model()), "base/1")
    for content in (b"\xff\xfe", b"[]", b"{", b"7"):
        (tmp_path / "adapter_config.json").write_bytes(content)
        with pytest.raises(CorruptArtifact):
            peft_format.unpack(read_handed_in(tmp_path, FINGERPRINT), torch.float32)


class _Bomb:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, evidence: Path) -> None:
        self._evidence = evidence

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._evidence,)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    folder, evidence = tmp_path / "adapter", tmp_path / "evidence"
    _peft_model(nano_model(), target_modules=["q_proj"], r=2).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": _Bomb(evidence)}, folder / "adapter_model.bin")
    with pytest.raises(InvalidInput, match=r"adapter_model\.safetensors .* cannot be read"):
        peft_format.unpack(read_handed_in(folder, FINGERPRINT), torch.float32)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    with pytest.raises(CorruptArtifact, match="safetensors file"):
        peft_format.unpack(read_handed_in(folder, FINGERPRINT), torch.float32)
    assert not evidence.exists()
    torch.load((folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), weights_only=False)
    assert evidence.exists(), "the pickle was meant to go off when it is loaded"


def test_some_layers_are_read_from_the_file_as_all_are_from_its_bytes(tmp_path: Path) -> None:
    peft_format.save(tmp_path, random_adapter(nano_model(), (4, 2)), "base/1")
    packed, file = pack(tmp_path), tmp_path / "adapter_model.safetensors"
    whole = peft_format.unpack(packed, torch.float32).factors
    sizes = {name: (f.b_OR.shape[0], f.a_RI.shape[1], f.rank) for name, f in whole.items()}
    assert peft_format.layer_sizes(file) == sizes
    some = sorted(whole)[1::2]
    part = peft_format.unpack_layers(file, packed, [*some, "model.layers.99.mlp.up_proj"], torch.float32)
    assert part is not None
    assert part.base_fingerprint == FINGERPRINT
    assert sorted(part.factors) == some
    for name, factors in part.factors.items():
        assert torch.equal(factors.a_RI, whole[name].a_RI)
        assert torch.equal(factors.b_OR, whole[name].b_OR)
        assert factors.scale == whole[name].scale
    assert peft_format.unpack_layers(file, packed, ["none"], torch.float32) is None
    file.write_bytes(b"not a file of tensors")
    with pytest.raises(CorruptArtifact, match="PEFT's layout"):
        peft_format.unpack_layers(file, packed, some, torch.float32)
    with pytest.raises(CorruptArtifact, match="PEFT's layout"):
        peft_format.layer_sizes(file)
