"""Training on a base that others made: taken over as it is, its adapters learned and served, its logits its own."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers

from cluster.config.training import AdapterSettings, JointSettings, Recipe, RouterSettings, StageSettings
from cluster.errors import InvalidInput
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog
from cluster.lora.weights import adaptable_layers
from cluster.messages import AdapterRef
from cluster.model.base import encode_prompt, fingerprint
from cluster.training import STAGES
from cluster.training.artifacts import published_adapter, published_base
from cluster.training.data import collate, encode, read_data
from cluster.training.given_base import take_over_base
from cluster.training.language_model import batch_loss, mean_loss
from cluster.training.trainable_lora import TrainableAdapters
from cluster.training.workers import Workers
from tests.model.foreign import ARCHITECTURES, CHATML, foreign_tokenizer, write_foreign
from tests.model.shapes import small_model
from tests.training.rows import some_examples, write_parquet

RECIPE = Recipe(
    adapters=AdapterSettings(rank=4, num_steps=8, tokens_per_batch=128, learning_rate=0.01),
    router=RouterSettings(steps=10, batch_size=8),
    joint=JointSettings(num_steps=1, rows_per_domain=1, epsilon=10.0),
)


class QuietRun:
    """A run that keeps what it is told and no checkpoints."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.workers = Workers()

    def start(self, title: str, num_steps: int) -> None:
        pass

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)

    def checkpoint(self, save: object) -> None:
        pass

    def restore(self) -> None:
        return None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return write_parquet(
        folder,
        domain=["law", "law", "math", "math", "none", "none"],
        prompt=["is this legal?", "may I sue?", "7 times 6", "2 plus 2", "good morning", "hello"],
        response=["yes", "no", "42", "4", "hello", "hi"],
        split=["train", "val", "train", "val", "train", "val"],
    )


@pytest.mark.parametrize("architecture", ["llama", "smollm3"])
def test_all_stages_on_a_base_that_is_there_already(architecture: str, tmp_path: Path, data: Path) -> None:
    template = None if architecture == "llama" else CHATML
    folder, root = write_foreign(tmp_path / "mine", architecture, template), tmp_path / "root"
    settings = StageSettings(root=root, data=data, recipe=RECIPE, name="test", base=str(folder))
    for stage in STAGES.values():
        stage(settings, QuietRun())
    state = Catalog(root).load()
    assert (state.base, state.router) == (1, 2)
    assert state.adapters == {"law": 2, "math": 2}
    assert fingerprint(root / "base" / "1") == fingerprint(folder)
    base = published_base(root, state)
    weights = {domain: published_adapter(root, AdapterRef(domain, 2)) for domain in ("law", "math")}
    for adapter in weights.values():
        adapter.check_fits(adaptable_layers(base.model), base.fingerprint)
        assert adapter.factors.keys() == adaptable_layers(base.model).keys()
    adapters = TrainableAdapters(base.model, weights)
    for domain in weights:
        examples = encode(base.tokenizer, read_data(data).rows("train", domain), 100)
        losses = []
        for chosen in (None, domain):
            adapters.select(chosen)
            losses.append(mean_loss(base.model, examples, 0))
        assert losses[1] < losses[0] - 0.1


def test_a_base_is_taken_over_once_without_its_code_and_another_withdraws_the_adapters(tmp_path: Path) -> None:
    first, second = (write_foreign(tmp_path / name, name) for name in ("qwen2", "llama"))
    (first / "modeling.py").write_text("raise SystemExit")
    (first / "optimizer.bin").write_bytes(b"pickle")
    root, said = tmp_path / "root", list[str]()
    for _ in range(2):
        take_over_base(root, str(first), said.append)
    assert Catalog(root).load().base == 1
    assert "is the root's base already, version 1" in said[-1]
    copied = {file.name for file in (root / "base" / "1").iterdir()} - {"checksums.json"}
    assert copied == {file.name for file in first.iterdir()} - {"modeling.py", "optimizer.bin"}
    assert Store(root).folder("base/1") == root / "base" / "1"
    take_over_base(root, str(second), said.append)
    assert Catalog(root).load().base == 2
    take_over_base(tmp_path / "other", str(root / "base" / "1"), said.append)
    assert fingerprint(Store(tmp_path / "other").folder("base/1")) == fingerprint(first)


def test_a_base_that_cannot_be_served_is_not_taken_over(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "base")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "vocab_size": 200}))
    with pytest.raises(InvalidInput, match="the model embeds 200 tokens"):
        take_over_base(tmp_path / "root", str(folder), print)
    assert not (tmp_path / "root").exists()


def test_rows_are_asked_as_the_base_will_be(tmp_path: Path, data: Path) -> None:
    rows = read_data(data).rows("train", "law")
    plain, chats = foreign_tokenizer(), foreign_tokenizer(CHATML)
    (by_text,), (by_turn,) = encode(plain, rows, 100), encode(chats, rows, 100)
    assert plain.decode(by_text.ids) == "is this legal?yes<|im_end|>"
    turn = "<|im_start|>user\nis this legal?<|im_end|>\n<|im_start|>assistant\n"
    assert chats.decode(by_turn.ids) == f"{turn}yes<|im_end|>"
    assert len(encode_prompt(chats, "is this legal?")) < by_turn.num_prompt_tokens
    assert encode(plain, [rows[0].__class__("law", "", "yes", "")], 100)[0].ids[0] == plain.eos_token_id


@pytest.mark.parametrize("name", [*ARCHITECTURES, "granite"])
def test_the_loss_of_packed_rows_is_the_models_own(name: str) -> None:
    """Granite scales its logits: its head alone would not do."""
    if name == "granite":
        torch.manual_seed(0)
        shape = {"vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**shape, **heads, logits_scaling=0.1))
        model.eval().requires_grad_(False)
    else:
        model = small_model(name, tied=False)
    tokenizer = foreign_tokenizer()
    examples = some_examples(tokenizer, 5)
    nats = 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.num_prompt_tokens] = -100
        nats += float(model(input_ids=ids, labels=labels).loss) * (len(example.ids) - example.num_prompt_tokens)
    packed = collate([examples[:3], examples[3:]], 0, learn_prompts=False)
    assert float(batch_loss(model, packed)) == pytest.approx(nats / packed.num_labels, rel=1e-4)
