"""Tiny ada with a pretrained sentence encoder: what holds of her with n-grams alone holds here too."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config.training import RouterSettings
from cluster.errors import CorruptArtifact, InvalidInput
from cluster.messages import NONE_DOMAIN
from cluster.router.explanation import explain, words
from cluster.router.features import PAIR, TextFeatures, collate, extract
from cluster.router.fit import MOST_SHARE_OF_BASE, PARAMETER_FLOOR, RouterFit
from cluster.router.sentence_encoder import SentenceEncoder
from cluster.router.sentence_model import SentenceModel
from cluster.router.tiny_ada import TinyAda
from tests.router.prompts import STRANGE, prompts
from tests.router.small_bert import write_small_bert
from tests.router.test_tiny_ada import NEW_TAX, TAX, _answers, _share

TEXTS = [*prompts("val", 5)[0], *STRANGE, "", "rain " * 3000]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_bert(tmp_path_factory.mktemp("small-bert"))


def _fit(bert: Path, num_texts: int = 60, num_base_parameters: int = 1_000_000) -> RouterFit:
    settings = RouterSettings(steps=80, batch_size=64, prototypes_per_domain=4, sentence_encoder=str(bert))
    return RouterFit(*prompts("train", num_texts), *prompts("val", 20), settings, num_base_parameters)


@pytest.fixture(scope="module")
def fused(bert: Path) -> TinyAda:
    """A trained router. Read it; do not change it."""
    run = _fit(bert)
    for _ in range(run.num_steps):
        run.step()
    return run.finish()


def _encoder(ada: TinyAda) -> SentenceEncoder:
    assert isinstance(ada.encoder, SentenceEncoder)
    return ada.encoder


def test_unseen_sentences_reach_their_domain_and_strange_ones_none(fused: TinyAda) -> None:
    texts, domains = prompts("val", 30, seed=1)
    assert _share(_answers(fused.route(texts)), domains) >= 0.95
    assert _answers(fused.route(STRANGE)).count(NONE_DOMAIN) >= len(STRANGE) - 2


def test_the_vector_is_that_of_both(fused: TinyAda) -> None:
    encoder = _encoder(fused)
    encoding, ngrams = fused.encode(TEXTS), encoder.ngrams(collate([extract(text) for text in TEXTS]))
    together = ngrams.z_BW + encoder.sentences.embed(TEXTS) @ encoder.projection.weight.T
    assert torch.allclose(encoding.z_BW, together / torch.linalg.vector_norm(together, dim=1, keepdim=True), atol=1e-5)
    assert torch.equal(encoding.evidence_BE, ngrams.evidence_BE)


def test_the_sketch_is_the_sentence_whitened(bert: Path) -> None:
    """Against the singular values of the vectors, in double precision; angles between sketches are what counts."""
    run = _fit(bert)
    encoder = run.encoder
    assert isinstance(encoder, SentenceEncoder)
    vectors = encoder.sentences.embed(prompts("train", 60)[0])
    encoder.orient(vectors)
    centred = vectors.double().numpy() - vectors.double().numpy().mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    variances = values**2 / len(vectors)
    some = encoder.sentences.embed(TEXTS).double().numpy() - vectors.double().numpy().mean(axis=0)
    whitened = some @ directions.T / np.sqrt(variances + 0.1 * variances.mean())
    whitened /= np.linalg.norm(whitened, axis=1, keepdims=True)
    sketches = encoder(collate(encoder.read(TEXTS))).novel_BU.double().detach().numpy()
    assert np.allclose(sketches @ sketches.T, whitened @ whitened.T, atol=1e-4)
    assert np.allclose(np.linalg.norm(sketches, axis=1), 1, atol=1e-5)


def test_the_loss_of_the_sentence_alone_is_that_of_prompts_without_a_known_word(fused: TinyAda) -> None:
    encoder = _encoder(fused)
    batch = collate(encoder.read(TEXTS))
    alone = encoder.without_ngrams(batch, encoder(batch))
    expected = torch.nn.functional.normalize(encoder.sentences.embed(TEXTS) @ encoder.projection.weight.T, dim=1)
    assert torch.allclose(alone.z_BW, expected, atol=1e-5)
    assert torch.equal(alone.evidence_BE, encoder(batch).evidence_BE)


def test_a_text_is_decided_alike_alone_and_in_a_batch(fused: TinyAda) -> None:
    together = fused.logits(TEXTS)
    alone = torch.cat([fused.logits([text]) for text in TEXTS])
    # Of logits up to 15: whitening makes the rounding of the encoder's batches larger, to 3e-4 here.
    assert torch.allclose(together, alone, atol=5e-4)


def test_training_reaches_the_projection_and_the_last_layers_and_no_training_a_router_that_is_done(
    fused: TinyAda, bert: Path
) -> None:
    copied = copy.deepcopy(fused)
    assert _encoder(copied).sentences is _encoder(fused).sentences
    copied.scores(["Will it rain?"])[0, 0].backward()  # type: ignore[no-untyped-call]
    gradient = _encoder(copied).projection.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
    assert not _encoder(fused).sentences.trained()
    assert not torch.allclose(_encoder(fused).sentences.embed(TEXTS), SentenceModel.load(bert).embed(TEXTS), atol=1e-3)
    run = _fit(bert)
    begun = run.finish()
    assert not torch.allclose(_encoder(begun).projection.weight, _encoder(fused).projection.weight, atol=0.01)
    before = begun.logits(TEXTS)
    run.step()
    assert torch.equal(begun.logits(TEXTS), before)


def test_all_parameters_count(fused: TinyAda, bert: Path) -> None:
    num_pretrained = _encoder(fused).sentences.num_parameters
    assert num_pretrained > 5_000
    assert not any("sentences" in name for name, _ in fused.named_parameters())
    trained = sum(parameter.numel() for parameter in fused.parameters())
    assert fused.num_parameters == trained + num_pretrained
    assert 0.9 * PARAMETER_FLOOR < trained <= PARAMETER_FLOOR
    large = _fit(bert, num_base_parameters=20_000_000).finish().num_parameters
    assert 0.9 * MOST_SHARE_OF_BASE * 20_000_000 < large <= MOST_SHARE_OF_BASE * 20_000_000


@pytest.mark.parametrize("num_done", [1, 5, 6], ids=["while tuning", "tuned", "while learning"])
def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(bert: Path, tmp_path: Path, num_done: int) -> None:
    unbroken, interrupted = _fit(bert, 20), _fit(bert, 20)
    assert unbroken.num_steps == 80 + 5
    losses = [unbroken.step() for _ in range(8)]
    for _ in range(num_done):
        interrupted.step()
    interrupted.save(tmp_path)
    resumed = _fit(bert, 20)
    assert resumed.load(tmp_path) == num_done
    assert [resumed.step() for _ in range(8 - num_done)] == losses[num_done:]
    assert torch.equal(resumed.finish().logits(TEXTS), unbroken.finish().logits(TEXTS))


def test_a_domain_comes_and_goes_without_a_trace(fused: TinyAda) -> None:
    before = fused.head.raw_logits(fused.encode(TEXTS))
    grown = fused.with_domain("tax", TAX)
    after = grown.head.raw_logits(grown.encode(TEXTS))
    new = grown.domains.index("tax")
    assert torch.equal(torch.cat((after[:, :new], after[:, new + 1 :]), dim=1), before)
    assert torch.equal(grown.without_domain("tax").head.raw_logits(fused.encode(TEXTS)), before)
    assert _answers(grown.route(NEW_TAX)).count("tax") >= 2


def test_beside_a_sentence_a_new_domain_needs_no_offset_and_its_vector_counts_for_less(fused: TinyAda) -> None:
    """Decision 35: 0.55 beside the sketch's 1, where without a sentence it is seven tenths."""
    grown = fused.with_domain("tax", TAX)
    new = grown.domains.index("tax")
    rows = grown.head.prototypes_DPV[new, : int(grown.head.num_prototypes_D[new])]
    width = _encoder(fused).width
    lengths = [torch.linalg.vector_norm(part, dim=1) for part in rows.tensor_split([width], dim=1)]
    assert torch.allclose(lengths[0], torch.tensor(0.55), atol=1e-5)
    assert torch.allclose(lengths[1], torch.tensor(1.0), atol=1e-5)
    assert not grown.head.offsets_D.any()


def test_refitting_and_chats_work_as_ever(fused: TinyAda) -> None:
    refitted = copy.deepcopy(fused)
    refitted.refit(*prompts("train", 40), *prompts("train", 20, seed=5))
    texts, domains = prompts("val", 30, seed=3)
    assert _share(_answers(refitted.route(texts)), domains) >= 0.95
    chat = ["Will it rain in the garden?", "and snow?"]
    assert _answers([fused.route_conversation(chat)]) == ["weather"]


def test_what_is_saved_needs_nothing_else(bert: Path, tmp_path: Path) -> None:
    source, saved = tmp_path / "source", tmp_path / "saved"
    shutil.copytree(bert, source)
    ada = _fit(source, 20).finish().with_domain("tax", TAX)
    expected = ada.logits(TEXTS)
    saved.mkdir()
    ada.save(saved)
    shutil.rmtree(source)
    assert torch.equal(TinyAda.load(saved).logits(TEXTS), expected)
    assert {file.suffix for file in saved.rglob("*") if file.is_file()} == {".json", ".safetensors"}


def test_another_sentence_encoder_is_refused(fused: TinyAda, tmp_path: Path) -> None:
    fused.save(tmp_path)
    model = tmp_path / "sentence_encoder"
    tokenizer = model / "tokenizer.json"
    good = tokenizer.read_text()
    tokenizer.write_text(good.replace('"rain"', '"niar"'))
    with pytest.raises(CorruptArtifact, match="not the one it was trained with"):
        TinyAda.load(tmp_path)
    tokenizer.write_text(good)
    TinyAda.load(tmp_path)
    config = tmp_path / "router.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "sentence_checksum": None}))
    with pytest.raises(CorruptArtifact):
        TinyAda.load(tmp_path)
    config.write_text(json.dumps(told))
    shutil.rmtree(model)
    with pytest.raises(CorruptArtifact):
        TinyAda.load(tmp_path)


def test_a_model_that_is_not_there_is_told_before_training() -> None:
    with pytest.raises(InvalidInput, match="no installed package 'nowhere'"):
        _fit(Path("nowhere"))


@pytest.mark.parametrize("text", ["Will it RAIN, or rain?", "Ｗｉｌｌ it rain in ﬁve cities?", "penicillin"])
def test_without_a_word_the_sentence_is_read_without_it(fused: TinyAda, text: str) -> None:
    found = explain(fused, text)
    encoder = _encoder(fused)
    for effect in found.effects:
        if effect.kind != "word":
            continue
        features = extract(text)
        at = [index for index, word in enumerate(words(text)) if word == effect.text]
        gone = [
            word in at or (kind == PAIR and word - 1 in at)
            for word, kind in zip(features.words_N.tolist(), features.kinds_N.tolist(), strict=True)
        ]
        kept = [index for index, is_gone in enumerate(gone) if not is_gone]
        # The small BERT splits at punctuation, so it does not matter how many spaces stand between what is left.
        left = " ".join(word for word in words(text) if word != effect.text)
        shorter = TextFeatures(
            features.slots_N[kept],
            features.kinds_N[kept],
            features.words_N[kept],
            features.num_words,
            encoder.sentences.embed([left]).numpy()[0],
        )
        row = fused.head(encoder(collate([shorter])))[0].tolist()
        logits = dict(zip((*fused.domains, NONE_DOMAIN), row, strict=True))
        margin = logits[found.domain] - logits[found.against]
        assert effect.effect == pytest.approx(found.margin - margin, abs=1e-3), effect
    assert {effect.text for effect in found.effects if effect.kind == "word"} == set(words(text))
