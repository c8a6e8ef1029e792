"""`zephyra quantize` and the setting that serves what it wrote."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from cluster.config.serving import AppSettings
from cluster.errors import CorruptArtifact, InvalidInput, NotTrained
from cluster.lora.catalog import Catalog
from cluster.lora.delta import dense_delta
from cluster.lora.packed_adapter import pack
from cluster.lora.peft_format import unpack
from cluster.lora.weights import adaptable_layers
from cluster.messages import AdapterRef, GenerateRequest, Mixture, SamplingParams
from cluster.model.base import encode_prompt, load_base
from cluster.model.quantization import QuantizedLinear
from deployments.cli import app
from deployments.replica.base_folder import base_folder
from deployments.replica.base_replica import BaseReplica
from deployments.shards.adapter_shard import AdapterShard
from deployments.shards.coordinator import Coordinator
from tests.model.shapes import with_dequantized_weights
from tests.nano import nano_base
from tests.serving.local import LocalHandle


def quantize(*arguments):
    return CliRunner().invoke(app, ["quantize", *(str(argument) for argument in arguments)])


def settings_of(root, quantization=None):
    return AppSettings(root=str(root), quantization=quantization)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_it_writes_is_what_the_setting_serves(own_root, bits):
    before = Catalog(own_root).load()
    done = quantize("--bits", bits, "--root", own_root)
    folder = own_root / "base" / f"1-int{bits}"
    assert done.exit_code == 0, done.output
    assert f"written to {folder} (" in done.output
    assert base_folder(settings_of(own_root, f"int{bits}")) == folder
    assert base_folder(AppSettings(base=str(folder))) == folder
    assert base_folder(AppSettings(base=str(folder), quantization=f"int{bits}")) == folder
    assert base_folder(settings_of(own_root)) == own_root / "base" / "1"
    base = load_base(folder)
    layer = base.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantizedLinear)
    assert layer.matrix.bits == bits
    assert base.fingerprint == nano_base(own_root).fingerprint
    assert Catalog(own_root).load() == before
    assert AppSettings(base=str(folder)).resolved_root() == own_root, "its adapters and its router go with it"


def test_doing_it_again_changes_nothing(own_root):
    quantize("--bits", 8, "--root", own_root)
    folder = own_root / "base" / "1-int8"
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    done = quantize("--bits", 8, "--root", own_root)
    assert done.exit_code == 0
    assert f"it is there already: {folder}" in done.output
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()} == before
    assert sorted(file.name for file in (own_root / "base").iterdir()) == ["1", "1-int8"], "no draft is left"


def test_another_folder_and_another_place(own_root, tmp_path):
    copy = shutil.copytree(own_root / "base" / "1", tmp_path / "models" / "mine")
    done = quantize("--bits", 4, "--base", copy, "--output", tmp_path / "elsewhere" / "small")
    assert done.exit_code == 0, done.output
    assert load_base(tmp_path / "elsewhere" / "small").fingerprint == load_base(copy).fingerprint
    assert quantize("--bits", 8, "--base", copy).exit_code == 0
    assert base_folder(AppSettings(base=str(copy), quantization="int8")) == tmp_path / "models" / "mine-int8"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "5"], "--bits is 5; expected 8 or 4."),
        (["--bits", "8", "--root", "{empty}"], "holds no base; train one"),
        (["--bits", "8", "--base", "{empty}/nowhere"], "There is no model in"),
        (["--bits", "8", "--root", "{root}", "--output", "{empty}"], "is there and holds something else"),
        (["--bits", "4", "--root", "{root}", "--output", "{root}/base/1-int8"], "is there and holds something else"),
        (["--bits", "4", "--base", "{root}/base/1-int8"], "quantized already; quantize the one it was made of"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_leaves_no_trace(own_root, tmp_path, arguments, said):
    quantize("--bits", 8, "--root", own_root)
    empty = tmp_path / "empty"
    empty.mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = quantize(*(argument.format(empty=empty, root=own_root) for argument in arguments))
    assert done.exit_code == 1
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
    assert sorted(tmp_path.rglob("*")) == before


def test_serving_what_was_not_written_says_the_command(own_root):
    with pytest.raises(NotTrained, match=f"zephyra quantize --bits 4 --root {own_root}`"):
        base_folder(settings_of(own_root, "int4"))
    with pytest.raises(NotTrained, match=f"zephyra quantize --bits 8 --base {own_root}/base/1`"):
        base_folder(AppSettings(base=str(own_root / "base" / "1"), quantization="int8"))
    quantize("--bits", 8, "--root", own_root)
    with pytest.raises(InvalidInput, match="'1-int8' is int8, not int4"):
        base_folder(AppSettings(base=str(own_root / "base" / "1-int8"), quantization="int4"))


def test_weights_that_changed_since_are_noticed(own_root, tmp_path):
    mine = shutil.copytree(own_root / "base" / "1", tmp_path / "models" / "mine")
    quantize("--bits", 8, "--base", mine)
    settings = AppSettings(base=str(mine), quantization="int8")
    config = mine / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5_000.0}))
    with pytest.raises(InvalidInput, match="'mine-int8' was made of other weights than 'mine' holds now; remove it"):
        base_folder(settings)
    done = quantize("--bits", 8, "--base", mine)
    assert "holds something else" in " ".join(done.stderr.split())
    (tmp_path / "models" / "mine-int8" / "quantization.json").write_text("{")
    with pytest.raises(CorruptArtifact, match=r"no quantization\.json that can be read"):
        base_folder(settings)


def test_a_published_base_that_changed_is_not_served(own_root):
    config = own_root / "base" / "1" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5_000.0}))
    with pytest.raises(CorruptArtifact, match=r"config\.json of base/1 is not what was published"):
        base_folder(settings_of(own_root))


@pytest.mark.anyio
@pytest.mark.parametrize("quantization", ["int8", "int4"])
async def test_a_replica_answers_with_the_quantized_base_and_its_adapters(own_root, quantization):
    quantize("--bits", quantization.removeprefix("int"), "--root", own_root)
    shard = AdapterShard(str(own_root))
    coordinator = Coordinator([LocalHandle(shard)])
    settings = AppSettings(root=str(own_root), quantization=quantization, threads=1)
    replica = BaseReplica(LocalHandle(coordinator), settings)
    try:
        for mixture in (Mixture(), Mixture.of({AdapterRef("law", 1): 1.0})):
            request = GenerateRequest("r", "What is 7 times 6?", mixture, SamplingParams(max_tokens=10))
            chunks = [chunk async for chunk in replica.generate(request)]
            got = [token for chunk in chunks for token in chunk.token_ids]
            assert got == _generated(own_root, quantization, mixture, len(got))
            assert len(got) == 10
    finally:
        replica.engine.stop()


def _generated(root, quantization, mixture, num_tokens):
    """By transformers, on floats that are what the integers stand for, the mixture merged into them."""
    plain, quantized = nano_base(root), load_base(base_folder(settings_of(root, quantization)))
    model = with_dequantized_weights(plain.model, quantized.model)
    for ref, weight in mixture.entries:
        adapter = unpack(pack(root / "adapters" / ref.domain / str(ref.version)), torch.float32)
        for name, linear in adaptable_layers(model).items():
            part = adapter.factors[name]
            linear.weight += dense_delta([(part.a_RI, part.b_OR * part.scale)], [weight]).float()
    ids_BT = torch.tensor([encode_prompt(plain.tokenizer, "What is 7 times 6?")])
    out_BT = model.generate(ids_BT, max_new_tokens=num_tokens, do_sample=False, attention_mask=torch.ones_like(ids_BT))
    return out_BT[0, ids_BT.shape[1] :].tolist()
