"""What a training step hides, by its rules."""

import numpy as np
import pytest
import torch

from cluster.router import episodes
from cluster.router.episodes import Episode, draw_episode
from cluster.router.features import PAIR, WORD, FeatureBatch, collate, extract
from cluster.router.lexicon import Counted, count
from tests.router.conftest import SETTINGS
from tests.router.prompts import DOMAINS, prompts

NONE = len(DOMAINS)


@pytest.fixture(scope="module")
def counted() -> Counted:
    texts, domains = prompts("train", 60)
    numbers = np.array([DOMAINS.index(name) for name in domains])
    return count([extract(text) for text in texts], numbers, NONE + 1, num_rows=2_000)


def _batch() -> tuple[FeatureBatch, torch.Tensor]:
    texts, domains = prompts("train", 40)
    return collate([extract(text) for text in texts]), torch.tensor([DOMAINS.index(name) for name in domains])


def _draw(counted: Counted, seed: int, **changes: float) -> tuple[FeatureBatch, torch.Tensor, Episode]:
    quiet = {"word_dropout": 0.0, "pair_dropout": 0.0, "outlier_rate": 0.0, "hidden_domain_rate": 0.0}
    settings = SETTINGS.model_copy(update={**quiet, **changes})
    batch, labels = _batch()
    rng = torch.Generator().manual_seed(seed)
    return batch, labels, draw_episode(batch, labels, counted, NONE, settings, rng)


def test_without_any_rate_only_features_of_a_single_text_are_hidden(counted: Counted) -> None:
    batch, labels, episode = _draw(counted, seed=0)
    assert torch.equal(episode.hidden_N, ~counted.repeated[batch.slots_N])
    assert torch.equal(episode.labels_B, labels)
    assert not episode.hidden_D.any()


def test_a_hidden_domain_takes_its_own_words_along_and_teaches_none(counted: Counted) -> None:
    seen = set()
    for seed in range(12):
        batch, labels, episode = _draw(counted, seed, hidden_domain_rate=1.0)
        (hidden,) = episode.hidden_D.nonzero()[:, 0].tolist()
        seen.add(hidden)
        assert (episode.labels_B[labels == hidden] == NONE).all()
        assert torch.equal(episode.labels_B[labels != hidden], labels[labels != hidden])
        only_there = counted.groups[batch.slots_N] == 1 << hidden
        assert torch.equal(episode.hidden_N, only_there | ~counted.repeated[batch.slots_N])
    assert len(seen) > 1


def test_prompts_lose_their_keywords_exactly_when_they_teach_none(counted: Counted) -> None:
    keyword = int(extract("table").slots_N[0])
    batch, labels, episode = _draw(counted, seed=0, outlier_rate=0.5, word_dropout=0.45)
    holds = batch.slots_N == keyword
    teaches_none = episode.labels_B[batch.texts_N[holds]] == NONE
    assert 0 < int(teaches_none.sum()) < len(teaches_none)
    assert torch.equal(episode.hidden_N[holds], teaches_none)
    assert torch.equal(episode.labels_B[episode.labels_B != NONE], labels[episode.labels_B != NONE])


def test_pairs_are_hidden_alone(counted: Counted) -> None:
    batch, _, episode = _draw(counted, seed=0, pair_dropout=0.5)
    pairs = batch.kinds_N == PAIR
    always = ~counted.repeated[batch.slots_N]
    assert torch.equal(episode.hidden_N[~pairs], always[~pairs])
    assert 0.3 < float(episode.hidden_N[pairs].float().mean()) < 0.8


def test_words_are_left_out_whole_but_for_keywords(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "_LONG", 1)
    batch, labels, episode = _draw(counted, seed=0, word_omission=0.4)
    num_features_W = torch.bincount(batch.words_N, minlength=batch.num_words)
    num_silent_W = torch.bincount(batch.words_N[episode.silent_N], minlength=batch.num_words)
    assert set((num_silent_W / num_features_W).tolist()) == {0.0, 1.0}
    assert 0.1 < float((num_silent_W > 0).float().mean()) < 0.5
    keyword = int(extract("table").slots_N[0])
    assert not episode.silent_N[batch.slots_N == keyword].any()
    assert torch.equal(episode.labels_B, labels), "what is left still tells the domain"
    assert torch.equal(episode.hidden_N, ~counted.repeated[batch.slots_N]), "nor is it taken for never seen"


def test_of_long_prompts_more_words_are_left_out(counted: Counted) -> None:
    texts = [" ".join(f"word{number}x" for number in range(length)) for length in [4, 60] * 300]
    batch, labels = collate([extract(text) for text in texts]), torch.full((600,), NONE)
    settings = SETTINGS.model_copy(update={"word_omission": 0.4})
    episode = draw_episode(batch, labels, counted, NONE, settings, torch.Generator().manual_seed(0))
    is_long = batch.texts_N % 2 == 1
    short, long = (
        float(episode.silent_N[(batch.kinds_N == WORD) & part].float().mean()) for part in (~is_long, is_long)
    )
    assert long == pytest.approx(0.4, abs=0.04)
    assert short == pytest.approx(0.4 * 4 / episodes._LONG, abs=0.02)
