"""What is refused as a base, before its weights are read, and how that is said; what is not is served exactly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.config.serving import EngineSettings
from cluster.engine.engine import Engine
from cluster.errors import InvalidInput, NotTrained
from cluster.messages import GenerateRequest, Mixture, SamplingParams
from cluster.model.base import load_base
from cluster.model.servable import check_servable, check_structure
from tests.model.foreign import QUESTION, foreign_tokenizer, write_foreign
from tests.model.shapes import VOCABULARY

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COMPRESSED = {
    **SHAPE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "linear layers of another kind": ("GPT2", OLD, "Conv1D instead of linear layers"),
    "state space": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}, "state-space"),
    "encoder and decoder": ("T5", {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 1}, "an encoder with a deco"),
    "experts": ("Mixtral", {**SHAPE, "num_local_experts": 2}, "mixture of experts"),
    "soft-capped scores": ("Gemma2", {**SHAPE, "head_dim": 8}, "attention takes softcap"),
    "compressed keys": ("DeepseekV3", {**COMPRESSED, "first_k_dense_replace": 2}, "keys and values are compressed"),
    "compressed keys and experts": ("DeepseekV3", {**COMPRESSED, "first_k_dense_replace": 1}, "mixture of experts"),
    "a window": ("Mistral", {**SHAPE, "sliding_window": 32}, "sliding_attention (window 32)"),
    "convolutions between": (
        "Lfm2",
        {**SHAPE, "layer_types": ["conv", "full_attention"]},
        "state-space or convolutional",
    ),
    "two attentions in a layer": ("DiffLlama", SHAPE, "do not each attend once"),
    "an attention of its own": (
        "Falcon",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        "do not all attend through",
    ),
    "no arguments to its attention": ("Nemotron", SHAPE, "do not each attend once"),
    "an encoder": ("Bert", {**SHAPE}, "its tokens see those after them"),
}


def _made(name: str, options: dict[str, Any]) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**options)
    kind = {"GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration", "Bert": "BertLMHeadModel"}
    model: PreTrainedModel = getattr(transformers, kind.get(name, f"{name}ForCausalLM"))(config)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_of_another_structure_is_refused_by_one_sentence(case: str, tmp_path: Path) -> None:
    name, options, why = REFUSED[case]
    model = _made(name, options)
    folder = write_foreign(tmp_path / "base", model)
    with pytest.raises(InvalidInput) as caught:
        check_servable(folder)
    sentence = str(caught.value)
    assert f"of type {model.config.model_type!r}" in sentence
    assert why in sentence
    assert "such as Llama, Qwen2, Qwen3 or SmolLM3" in sentence
    assert str(tmp_path) not in sentence


def test_a_window_that_is_longer_than_the_context_is_none(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "base", _made("Mistral", {**SHAPE, "sliding_window": 32}))
    with pytest.raises(InvalidInput, match="or a context no longer than the window"):
        check_servable(folder, max_context_tokens=33)
    check_servable(folder, max_context_tokens=32)


def test_a_model_of_images_too_is_refused() -> None:
    text = {**SHAPE, "head_dim": 8}
    with pytest.raises(InvalidInput, match="'gemma3', made of more than a language model"):
        check_structure(transformers.Gemma3Config(text_config=text))
    with pytest.raises(InvalidInput, match="'llava', not a causal language model of text"):
        check_structure(transformers.LlavaConfig())


SERVED = {
    "Gemma": {"head_dim": 8},
    "Granite": {"logits_scaling": 8.0, "attention_multiplier": 0.3},
    "Phi3": {},
    "GPTNeoX": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("name", SERVED)
def test_what_is_not_refused_is_served_exactly(name: str, tmp_path: Path) -> None:
    """Llama, Qwen and SmolLM have tests of their own; of these only the check says that the engine can run them."""
    torch.manual_seed(0)
    model = _made(name, {**SHAPE, **SERVED[name]})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    folder = write_foreign(tmp_path / "base", model)
    check_servable(folder)
    engine = Engine(load_base(folder), EngineSettings(max_step_tokens=16))
    prompts = (QUESTION, "the quick brown fox jumps over", "a")
    for prompt in prompts:
        engine.submit(GenerateRequest(prompt, prompt, Mixture(), SamplingParams(max_tokens=10, ignore_eos=True)))
    answers: dict[str, list[int]] = {prompt: [] for prompt in prompts}
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id] += output.chunk.token_ids
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for prompt in prompts:
        ids = torch.tensor([foreign_tokenizer()(prompt)["input_ids"]])
        whole = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, min_new_tokens=10,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert answers[prompt] == whole[0, ids.shape[1] :].tolist()


def _pickled(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _sharded_and_incomplete(folder: Path) -> None:
    names = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def _without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


OWN_CODE = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (_pickled, "holds only pytorch_model.bin; expected model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "a shard that is missing": (_sharded_and_incomplete, "lacks model-00002-of-00002.safetensors"),
    "code of its own": (
        _config(model_type="evil", auto_map=OWN_CODE),
        "'evil', which this version of transformers does not know, which comes with code of its own that is never run",
    ),
    "an unknown type": (_config(model_type="soup"), "'soup', which this version of transformers does not know"),
    "quantized by others": (_config(quantization_config={"quant_method": "gptq"}), "quantized already, by gptq"),
    "a config.json that is none": (lambda f: (f / "config.json").write_text("{"), "in 'base' cannot be read"),
    "no tokenizer": (_without_tokenizer, "holds no tokenizer"),
    "a tokenizer of another model": (_config(vocab_size=200), "the model embeds 200 tokens"),
    "a shape that cannot be": (_config(num_attention_heads=0), "'qwen2'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign(tmp_path_factory.mktemp("whole") / "base")


@pytest.mark.parametrize("case", SPOILT)
def test_a_folder_that_is_not_whole_is_refused_by_one_sentence(case: str, whole: Path, tmp_path: Path) -> None:
    spoil, sentence = SPOILT[case]
    folder = Path(shutil.copytree(whole, tmp_path / "base"))
    check_servable(folder)
    spoil(folder)
    with pytest.raises(InvalidInput) as caught:
        check_servable(folder)
    assert sentence in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_there_must_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(NotTrained, match=r"name a folder with a config\.json"):
        check_servable(tmp_path)


def test_code_beside_a_model_is_never_run(whole: Path, tmp_path: Path) -> None:
    """Of a type that transformers knows itself, which needs none."""
    folder = Path(shutil.copytree(whole, tmp_path / "base"))
    names = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.T", None],
    }
    _config(auto_map=names)(folder)
    mark = tmp_path / "was-run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    check_servable(folder)
    assert type(load_base(folder).model).__name__ == "Qwen2ForCausalLM"
    assert not mark.exists()
