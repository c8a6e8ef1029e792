"""A sentence encoder's last layers tuned to the texts: against a gradient by hand, what changes and what must not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertModel

from cluster.router.sentence_model import SentenceModel
from cluster.router.tuning import Tuning, kinds_of
from tests.router.prompts import prompts
from tests.router.small_bert import WIDTH, write_small_bert

TEXTS, DOMAINS = prompts("train", 20)
KINDS = torch.tensor([sorted(set(DOMAINS)).index(name) for name in DOMAINS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_bert(tmp_path_factory.mktemp("small-bert"))


@pytest.fixture(scope="module")
def bert(folder: Path) -> SentenceModel:
    return SentenceModel.load(folder)


def _tuned(bert: SentenceModel, seed: int = 0) -> Tuning:
    run = Tuning(bert, TEXTS, KINDS, seed)
    for _ in range(run.num_steps):
        run.step()
    return run


def _right_by_centroid(model: SentenceModel) -> float:
    """The share of unseen texts that are nearest to the mean of their own kind's."""
    vectors = model.embed(TEXTS)
    means = torch.stack([vectors[kind == KINDS].mean(0) for kind in range(int(KINDS.max()) + 1)])
    texts, domains = prompts("val", 20)
    centred = nn.functional.normalize(model.embed(texts) - means.mean(0), dim=1)
    found = (centred @ nn.functional.normalize(means - means.mean(0), dim=1).T).argmax(1).tolist()
    return sum(sorted(set(DOMAINS))[kind] == name for kind, name in zip(found, domains, strict=True)) / len(texts)


def test_vectors_are_those_of_the_model_and_so_are_their_gradients(folder: Path, bert: SentenceModel) -> None:
    thawed, texts = bert.thawed(1), [*TEXTS[:9], "rain " * 30]
    random = torch.randn(len(texts), WIDTH, generator=torch.Generator().manual_seed(0))
    vectors = thawed.vectors(texts, at_once=4)
    assert torch.allclose(vectors, bert.embed(texts), atol=1e-6)
    torch.autograd.backward((vectors * random).sum())
    reference = BertModel.from_pretrained(folder).double().eval()
    alone = [reference(torch.tensor([bert._ids(text)])).last_hidden_state[0].mean(0) for text in texts]
    expected: Tensor = (nn.functional.normalize(torch.stack(alone), dim=1) * random).sum()
    torch.autograd.backward(expected)
    layers = list(reference.encoder.layer[-1].parameters())
    assert len(thawed.trained()) == len(layers)
    for own, other in zip(thawed.trained(), layers, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert torch.allclose(own.grad.double(), other.grad, atol=1e-4)


def test_tuning_tells_unseen_texts_apart_better_and_leaves_the_pretrained_model_alone(bert: SentenceModel) -> None:
    before = bert.embed(TEXTS)
    run = Tuning(bert, TEXTS, KINDS, seed=0)
    run.num_steps = 40
    losses = [run.step() for _ in range(run.num_steps)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert _right_by_centroid(run.model) > _right_by_centroid(bert)
    assert torch.equal(bert.embed(TEXTS), before)


def test_only_the_last_layers_move(bert: SentenceModel) -> None:
    run = Tuning(bert, TEXTS, KINDS, seed=0)
    run.step()
    old, new = (dict(nn.Module.named_parameters(model._model)) for model in (bert, run.model))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved
    assert all(name.startswith("encoder.layer.") for name in moved)
    assert {name for name, value in nn.Module.named_parameters(bert.thawed(1)._model) if value.requires_grad} == {
        name for name in old if name.startswith("encoder.layer.1.")
    }


def test_texts_of_no_kind_teach_nothing(bert: SentenceModel) -> None:
    kinds = torch.cat((KINDS, torch.full((3,), -1)))
    with_none = Tuning(bert, [*TEXTS, "lamp", "a lamp", "lamps"], kinds, seed=0)
    without = Tuning(bert, TEXTS, KINDS, seed=0)
    assert [with_none.step() for _ in range(2)] == [without.step() for _ in range(2)]


def test_the_same_seed_gives_the_same_model_also_when_interrupted(bert: SentenceModel) -> None:
    unbroken, broken = (Tuning(bert, TEXTS, KINDS, seed=3) for _ in range(2))
    losses = [unbroken.step() for _ in range(4)]
    for _ in range(2):
        broken.step()
    resumed = Tuning(bert, TEXTS, KINDS, seed=3)
    resumed.load_state_dict(broken.state_dict())
    assert [resumed.step() for _ in range(2)] == losses[2:]
    assert torch.equal(resumed.model.embed(TEXTS), unbroken.model.embed(TEXTS))
    other = Tuning(bert, TEXTS, KINDS, seed=4)
    assert other.step() != losses[0]


def test_few_texts_are_read_four_times_and_many_no_more_than_some_minutes_of_tokens(bert: SentenceModel) -> None:
    num_tokens = sum(map(bert.num_tokens, TEXTS))
    assert Tuning(bert, TEXTS, KINDS, seed=0).num_steps == -(-4 * len(TEXTS) // 64)
    copies = 500_000 // (2 * num_tokens)
    many = Tuning(bert, TEXTS * copies, KINDS.repeat(copies), seed=0)
    assert abs(many.num_steps * 64 - len(TEXTS) * copies * 2) < 0.02 * len(TEXTS) * copies


def test_a_kind_is_a_topic_of_a_domain_and_none_is_no_kind() -> None:
    labels = torch.tensor([0, 0, 1, 2, 1])
    assert kinds_of(labels, ["a", "b", "a", "a", "a"], 2).tolist() == [0, 1, 2, -1, 2]
    assert kinds_of(labels, None, 2).tolist() == [0, 0, 1, -1, 1]
