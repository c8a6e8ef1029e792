"""Votes by counting: against scikit-learn, and against counts from which a text was really left out."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from sklearn.naive_bayes import ComplementNB

from cluster.errors import CorruptArtifact
from cluster.router.episodes import Episode
from cluster.router.features import NUM_KINDS, FeatureBatch, TextFeatures, collate, extract
from cluster.router.fit import PARAMETER_FLOOR, RouterFit
from cluster.router.naive_bayes import NaiveBayes
from cluster.router.tiny_ada import TinyAda
from tests.router.conftest import SETTINGS
from tests.router.prompts import DOMAINS, prompts

NONE = len(DOMAINS)
WIDTH = 8


@pytest.fixture(scope="module")
def texts() -> list[TextFeatures]:
    return [extract(text) for text in prompts("train", 20)[0]]


@pytest.fixture(scope="module")
def labels() -> NDArray[np.int64]:
    """The third and every ninth after it belong to no domain."""
    found = np.array([DOMAINS.index(name) for name in prompts("train", 20)[1]])
    found[2::9] = NONE
    return found


def _counted(texts: list[TextFeatures], labels: NDArray[np.int64]) -> NaiveBayes:
    torch.manual_seed(0)
    return NaiveBayes.counted(texts, labels, NONE, WIDTH)


def _shown(batch: FeatureBatch, labels: NDArray[np.int64]) -> Episode:
    """An episode that hides nothing."""
    none_N = torch.zeros(len(batch.slots_N), dtype=torch.bool)
    own_B = torch.from_numpy(labels)
    return Episode(none_N, none_N, torch.zeros(NONE, dtype=torch.bool), own_B, own_B)


def _weights(batch: FeatureBatch) -> torch.Tensor:
    """Any: here each kind of feature has its own."""
    return torch.linspace(0.5, 1.5, NUM_KINDS)[batch.kinds_N]


def test_weights_are_those_of_scikit_learn(texts: list[TextFeatures], labels: NDArray[np.int64]) -> None:
    votes = _counted(texts, labels)
    slots, numbers = np.unique(np.concatenate([np.unique(text.slots_N) for text in texts]), return_inverse=True)
    held = np.zeros((len(texts), len(slots)))
    held[np.repeat(np.arange(len(texts)), [len(np.unique(text.slots_N)) for text in texts]), numbers] = 1
    theirs = ComplementNB(alpha=1.0).fit(held, labels)
    # Theirs are normalised for each class, ours count from what a feature without texts of the domain would have.
    in_all = 1 + held.sum(0)
    without_norm = theirs.feature_log_prob_ - np.log((in_all - theirs.feature_count_).sum(1))[:, None] + np.log(in_all)
    features = np.repeat(np.arange(len(votes.slots_F)), np.diff(votes.starts.numpy()))
    columns = np.searchsorted(slots, votes.slots_F.numpy())[features]
    np.testing.assert_allclose(votes.weights_M.numpy(), without_norm[votes.domains_M.numpy(), columns], atol=1e-5)
    assert len(features) == (theirs.feature_count_[:NONE] > 0).sum()


def test_in_training_a_text_is_judged_without_itself(texts: list[TextFeatures], labels: NDArray[np.int64]) -> None:
    votes = _counted(texts, labels)
    batch = collate(texts)
    found_BW = votes(batch, _weights(batch), _shown(batch, labels))
    for index, text in enumerate(texts[:12]):
        others = np.arange(len(texts)) != index
        without = _counted([texts[other] for other in others.nonzero()[0]], labels[others])
        without.load_state_dict(dict(votes.named_parameters()), strict=False)
        alone = collate([text])
        assert torch.allclose(found_BW[index], without(alone, _weights(alone))[0], atol=1e-5)
    assert not torch.allclose(found_BW, votes(batch, _weights(batch)), atol=1e-2)


def test_what_is_hidden_has_no_vote(texts: list[TextFeatures], labels: NDArray[np.int64]) -> None:
    votes = _counted(texts, labels)
    batch = collate(texts[:3])
    shown = _shown(batch, labels[:3])
    hidden_N = torch.arange(len(batch.slots_N)) % 3 == 0
    found_BW = votes(batch, _weights(batch), Episode(hidden_N, hidden_N, shown.hidden_D, shown.own_B, shown.labels_B))
    for index, text in enumerate(texts[:3]):
        kept = ~hidden_N[batch.texts_N == index].numpy()
        left = TextFeatures(text.slots_N[kept], text.kinds_N[kept], text.words_N[kept], text.num_words)
        alone = collate([left])
        expected_W = votes(alone, _weights(alone), _shown(alone, labels[index : index + 1]))[0]
        assert torch.allclose(found_BW[index], expected_W, atol=1e-5)
    nothing_N = torch.ones_like(hidden_N)
    silenced = Episode(shown.hidden_N, nothing_N, shown.hidden_D, shown.own_B, shown.labels_B)
    assert torch.equal(votes(batch, _weights(batch), silenced), votes(batch, _weights(batch), shown))
    hidden = Episode(nothing_N, shown.silent_N, shown.hidden_D, shown.own_B, shown.labels_B)
    assert torch.allclose(votes(batch, _weights(batch), hidden), votes(collate([extract("")]), torch.ones(1)))


def test_a_domain_with_next_to_none_of_a_features_texts_has_no_pair() -> None:
    texts = [extract("rain")] * 70
    votes = NaiveBayes.counted(texts, np.array([0] * 66 + [1] * 3 + [2]), 3, WIDTH)
    assert sorted(set(votes.domains_M.tolist())) == [0, 1]
    assert (votes.num_texts_F == 70).all()


def _run() -> RouterFit:
    settings = SETTINGS.model_copy(update={"naive_bayes": True})
    return RouterFit(*prompts("train", 60), *prompts("val", 20), settings, num_base_parameters=1_000_000)


def test_a_router_with_votes_is_saved_resumed_and_right(tmp_path: Path) -> None:
    unbroken, broken = _run(), _run()
    for number in range(unbroken.num_steps):
        unbroken.step()
        if number < unbroken.num_steps // 2:
            broken.step()
    resumed = _run()
    resumed.load_state_dict(broken.state_dict())
    for _ in range(unbroken.num_steps - unbroken.num_steps // 2):
        resumed.step()
    ada = unbroken.finish()
    assert ada.num_parameters <= PARAMETER_FLOOR
    texts, domains = prompts("val", 30, seed=3)
    logits = ada.logits(texts)
    assert torch.equal(resumed.finish().logits(texts), logits)
    ada.save(tmp_path)
    loaded = TinyAda.load(tmp_path)
    assert torch.equal(loaded.logits(texts), logits)
    right = [ada.domains[number] for number in logits[:, :-1].argmax(1).tolist()]
    assert np.mean([found == domain for found, domain in zip(right, domains, strict=True)]) >= 0.95


@pytest.mark.parametrize("broken", ["starts", "domains_M", "slots_F", "counts_M"])
def test_counts_that_point_nowhere_are_refused(tmp_path: Path, broken: str) -> None:
    _run().finish().save(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "router.safetensors")
    tensors[f"encoder.votes.{broken}"][-1] = 2**30
    safetensors.torch.save_file(tensors, tmp_path / "router.safetensors")
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        TinyAda.load(tmp_path)
