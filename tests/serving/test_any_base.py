"""Bases of others, served: adapters that PEFT made, answers that PEFT gives. On the real cluster: test_changes.py."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.config.serving import AppSettings
from cluster.errors import InvalidInput
from cluster.lora.artifacts import Store
from cluster.lora.packed_adapter import CONFIG_FILE
from cluster.training.given_base import take_over_base
from deployments.application import build
from deployments.domains.operations import Domains
from tests.model.foreign import ARCHITECTURES, CHATML, QUESTION, write_foreign
from tests.serving.handed_in import peft_folder
from tests.serving.http_client import client_of
from tests.serving.local import local_system

TURN = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def answers(base: Path | str, adapter: Path, text: str, max_tokens: int) -> tuple[str, str]:
    """What transformers says, and PEFT with the adapter, to tokens of `text` as it is: the reference."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    said = []
    # Two of them: PEFT changes the model that it is given.
    plain, wrapped = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    for one in (plain, PeftModel.from_pretrained(wrapped, str(adapter))):
        mask = torch.ones_like(ids)
        whole = one.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens)
        said.append(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))
    return said[0], said[1]


@pytest.mark.anyio
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_an_adapter_of_pefts_on_all_linear_layers_answers_as_it_does_there(
    architecture: str, tmp_path: Path
) -> None:
    template = None if architecture == "llama" else CHATML
    folder, root = write_foreign(tmp_path / "mine", architecture, template), tmp_path / "root"
    take_over_base(root, str(folder), print)
    adapter = peft_folder(root, tmp_path / "peft", init_lora_weights=False)
    targets = json.loads((adapter / CONFIG_FILE).read_text())["target_modules"]
    assert sorted({target.rpartition(".")[2] for target in targets}) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    Domains(Store(root)).add("tax", adapter)
    system = local_system(root, ["tax"])
    try:
        async with client_of(system.gateway) as client:
            for path, asked, text in (
                ("completions", {"prompt": QUESTION}, QUESTION),
                (
                    "chat/completions",
                    {"messages": [{"role": "user", "content": QUESTION}]},
                    TURN if template else QUESTION,
                ),
            ):
                for model, expected in zip(
                    ("base", "zephyra:tax"), answers(folder, adapter, text, max_tokens=12), strict=True
                ):
                    body = {"model": model, "max_tokens": 12, **asked}
                    choice = (await client.post(f"/v1/{path}", json=body)).json()["choices"][0]
                    assert (choice["text"] if path == "completions" else choice["message"]["content"]) == expected
    finally:
        system.replica.engine.stop()


def test_a_base_that_cannot_be_served_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "mine")
    content = json.loads((folder / "config.json").read_text())
    windowed = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 32}
    (folder / "config.json").write_text(json.dumps({**content, **windowed}))
    with pytest.raises(InvalidInput, match="'qwen2', a model whose layers use sliding_attention"):
        build(AppSettings(base=str(folder), root=str(tmp_path / "root")))
    assert not (tmp_path / "root").exists()
    short = {"max_context_tokens": 32, "max_step_tokens": 32}
    build(AppSettings(base=str(folder), root=str(tmp_path / "root"), engine=short))
