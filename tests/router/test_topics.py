"""Kinds of text within a domain: a prototype each, and a loss that torch's own cross entropy confirms."""

import math

import pytest
import torch

from cluster.config.training import RouterSettings
from cluster.errors import InvalidData
from cluster.router.episodes import Episode
from cluster.router.fit import RouterFit
from cluster.router.head import SHARPNESS
from cluster.router.topics import Topics
from tests.router.prompts import DOMAINS, prompts

LABELS_N = torch.tensor([0, 0, 0, 1, 1, 2])
NAMES = ["b", "a", "b", "only", "only", ""]
NONE = 2


def episode(labels_B: torch.Tensor, hidden_D: tuple[bool, bool] = (False, False)) -> Episode:
    unused_N = torch.zeros(0, dtype=torch.bool)
    return Episode(unused_N, unused_N, torch.tensor(hidden_D), labels_B, labels_B)


def test_a_domain_has_a_row_for_each_of_its_topics_and_the_usual_number_without():
    assert Topics(LABELS_N, NAMES, 2, num_unnamed=4).num_rows_D.tolist() == [2, 4]
    assert Topics(LABELS_N, None, 2, num_unnamed=4).num_rows_D.tolist() == [4, 4]
    assert not Topics(LABELS_N, None, 2, num_unnamed=4).are_known


def test_the_loss_is_the_cross_entropy_over_all_rows_that_exist_and_none():
    generator = torch.Generator().manual_seed(0)
    topics = Topics(LABELS_N, NAMES, 2, num_unnamed=3)
    z_BW = torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=1)
    prototypes_DPW = torch.randn(2, 3, 5, generator=generator)
    none_B1 = torch.randn(6, 1, generator=generator)
    got = topics.loss(z_BW, prototypes_DPW, none_B1, episode(LABELS_N), torch.arange(6))
    # By hand: rows 0 and 1 of domain 0 ("a", "b"), all three of domain 1, whose texts have no topic, and none.
    rows_FW = torch.cat((prototypes_DPW[0, :2], prototypes_DPW[1]))
    losses = []
    for text, target in ((0, 1), (1, 0), (2, 1), (5, 5)):
        logits = [SHARPNESS * float(z_BW[text] @ row_W) for row_W in rows_FW] + [float(none_B1[text])]
        losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[target])
    assert float(got) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_texts_of_a_hidden_domain_teach_none():
    topics = Topics(LABELS_N, NAMES, 2, num_unnamed=3)
    z_BW, prototypes_DPW = torch.eye(5)[:2], torch.eye(5)[:3].expand(2, 3, 5)
    none_B1 = torch.zeros(2, 1)
    hidden = episode(torch.tensor([NONE, NONE]), hidden_D=(True, False))
    got = topics.loss(z_BW, prototypes_DPW, none_B1, hidden, torch.tensor([0, 1]))
    assert float(got) == pytest.approx(math.log(math.exp(SHARPNESS) + 3), rel=1e-5)


def test_topics_that_are_not_one_for_each_text_are_refused():
    with pytest.raises(InvalidData, match="6 texts and 2 topics"):
        Topics(LABELS_N, NAMES[:2], 2, num_unnamed=3)


def test_a_router_trained_with_topics_holds_their_prototypes_and_knows_its_domains():
    texts, domains = prompts("train", 40)
    val_texts, val_domains = prompts("val", 20)
    topics = [text.split()[0] for text in texts]
    settings = RouterSettings(steps=80, batch_size=64, prototypes_per_domain=4, feature_dropout=0.2)
    fit = RouterFit(texts, domains, val_texts, val_domains, settings, 1_000_000, topics=topics)
    for _ in range(fit.num_steps):
        fit.step()
    ada = fit.finish()
    for index, domain in enumerate(DOMAINS):
        expected = {topic for topic, of_domain in zip(topics, domains, strict=True) if of_domain == domain}
        assert int(ada.head.num_prototypes_D[index]) == len(expected)
    best = ada.logits(val_texts)[:, :-1].argmax(1)
    right = [ada.domains[index] == domain for index, domain in zip(best.tolist(), val_domains, strict=True)]
    assert sum(right) >= 0.9 * len(right)
