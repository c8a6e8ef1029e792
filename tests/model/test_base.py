"""What names a base: its weights and shape, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import NotTrained
from cluster.model.base import fingerprint, load_base
from cluster.model.tokenizer import train_tokenizer
from tests.model.nano import logits, nano_model, random_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved base."""
    base = tmp_path / "base" / "1"
    nano_model().save_pretrained(base)
    train_tokenizer(["the quick brown fox"], vocab_size=300, max_length_tokens=512).save_pretrained(base)
    return base


def test_a_base_is_loaded_frozen_and_as_it_was_saved(folder: Path) -> None:
    base = load_base(folder)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert (base.name, base.context_tokens, base.fingerprint) == ("1", 512, fingerprint(folder))
    assert base.num_parameters == nano_model().num_parameters()
    ids_BT = random_ids(nano_model(), 1, 6)
    assert torch.equal(logits(base.model, ids_BT), logits(nano_model(), ids_BT))


def test_a_folder_without_a_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotTrained, match="train one with `zephyra train all`"):
        load_base(tmp_path)


def test_copies_elsewhere_and_other_library_versions_have_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "7"))
    config = json.loads((copy / "config.json").read_text())
    # Another order of the keys, as another version might write them.
    changed = {**dict(reversed(config.items())), "transformers_version": "5.99", "_name_or_path": "somebody/base"}
    (copy / "config.json").write_text(json.dumps(changed))
    (copy / "README.md").write_text("a note")
    assert fingerprint(copy) == fingerprint(folder)


@pytest.mark.parametrize("name", sorted(nano_model().state_dict().keys() - {"lm_head.weight"}))
def test_any_changed_weight_has_another_fingerprint(folder: Path, name: str) -> None:
    before = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].flatten()[-1:].add_(2**-10)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != before


def test_a_changed_shape_has_another_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 20_000.0}))
    assert fingerprint(folder) != before
