"""A domain from a few examples: its rows against slow means, its offset, and the sketch against exact TF-IDF."""

import math
from collections import Counter

import pytest
import torch

from cluster.errors import InvalidInput
from cluster.router.encoder import Encoder
from cluster.router.features import CHARACTERS, PAIR, WORD, collate, extract
from cluster.router.few_shot import RowShape, few_shot_logits, few_shot_offset, few_shot_prototypes
from cluster.router.fit import RouterFit
from cluster.router.head import SHARPNESS, keys
from cluster.router.lexicon import SILENT, UNKNOWN, count
from cluster.router.prototypes import recentre
from cluster.router.tiny_ada import TinyAda
from tests.router.conftest import SETTINGS
from tests.router.prompts import STRANGE, prompts

WIDTH = 6
TOPICS = ("refund", "deadline", "refund", "deadline", "bracket")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")
EXAMPLES = (
    "How do I file my income tax return?",
    "When is the tax declaration due?",
    "Is a pension deductible from income tax?",
    "By what day must taxes be paid?",
    "Which tax bracket am I in?",
)


def _keys(num_texts: int, seed: int) -> torch.Tensor:
    return torch.randn(num_texts, WIDTH + 9, generator=torch.Generator().manual_seed(seed))


def _row(examples: torch.Tensor) -> torch.Tensor:
    mean = examples.mean(0)
    return torch.cat((mean[:WIDTH] / mean[:WIDTH].norm() * 0.7, mean[WIDTH:] / mean[WIDTH:].norm()))


def test_each_topic_has_the_mean_of_its_examples() -> None:
    keys_NV = _keys(5, seed=0)
    found = few_shot_prototypes(keys_NV, RowShape(WIDTH, 2), TOPICS)
    expected = torch.stack([_row(keys_NV[[4]]), _row(keys_NV[[1, 3]]), _row(keys_NV[[0, 2]])])
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("topics", [None, ["all"] * 12])
def test_without_topics_to_tell_apart_examples_are_clustered(topics: list[str] | None) -> None:
    centres = torch.cat((torch.eye(WIDTH)[:3], torch.eye(9)[:3]), dim=1)
    found = few_shot_prototypes(centres.repeat(4, 1) + 0.01 * _keys(12, seed=1), RowShape(WIDTH, 3), topics)
    near = found @ centres.T
    assert sorted(near.argmax(1).tolist()) == [0, 1, 2]
    assert float(near.amax(1).min()) > 1.69
    assert len(few_shot_prototypes(centres, RowShape(WIDTH, 8))) == 3


def test_an_example_is_judged_without_itself() -> None:
    keys_NV = _keys(5, seed=2)
    # Two folds: the first of each topic, and the second where there is one.
    found = few_shot_logits(keys_NV, RowShape(WIDTH, 2), TOPICS)
    others = {0: [_row(keys_NV[[3]]), _row(keys_NV[[2]])], 2: [_row(keys_NV[[i]]) for i in (0, 1, 4)]}
    for example, rows in others.items():
        mean = sum(math.exp(SHARPNESS * float(row @ keys_NV[example])) for row in rows) / len(rows)
        assert math.isclose(float(found[example]), math.log(mean), rel_tol=1e-4, abs_tol=1e-4)
    alone = few_shot_logits(keys_NV[:1], RowShape(WIDTH, 2))
    assert math.isclose(float(alone), SHARPNESS * float(_row(keys_NV[:1]) @ keys_NV[0]), rel_tol=1e-4)


def test_the_offset_closes_part_of_the_gap_and_no_more_than_passing_none_needs() -> None:
    own, known = torch.tensor([4.0, 6.0, 8.0]), torch.tensor(11.0)
    far, near = (float(few_shot_offset(own, torch.full((3,), none), known)) for none in (99.0, 5.0))
    assert 0 < far < 5
    assert near < 1 < far
    assert float((own + near >= 5).float().mean()) >= 2 / 3


def test_topics_are_one_for_each_example_and_leave_other_logits_alone(ada: TinyAda) -> None:
    with pytest.raises(InvalidInput, match="5 examples and 4 topics"):
        ada.with_domain("tax", EXAMPLES, topics=TOPICS[:4])
    many = [f"tax {number} of {word}" for number in range(3) for word in NUMBERS]
    grown = ada.with_domain("tax", many, topics=[text.rsplit(" ", 1)[1] for text in many])
    new = grown.domains.index("tax")
    assert int(grown.head.num_prototypes_D[new]) == 7 > ada.head.prototypes_DPV.shape[1]
    texts = [*prompts("val", 10)[0], *STRANGE]
    before, after = (router.head.raw_logits(router.encode(texts)) for router in (ada, grown))
    assert torch.equal(torch.cat((after[:, :new], after[:, new + 1 :]), dim=1), before)


def test_products_of_sketches_are_those_of_tf_idf_vectors() -> None:
    texts, domains = prompts("train", 60)
    features = [extract(text) for text in texts]
    numbers = torch.tensor([sorted(set(domains)).index(domain) for domain in domains]).numpy()
    counted = count(features, numbers, len(set(domains)), num_rows=600)
    encoder = Encoder(counted.lexicon, 600, 8)
    holds = Counter(slot for text in features for slot in set(text.slots_N.tolist()))
    silent = [slot for slot in holds if counted.lexicon.rows[slot] == SILENT]
    rarity = {slot: math.log((1 + len(texts)) / (1 + num)) for slot, num in holds.items()}
    mean = sum(rarity[slot] * holds[slot] for slot in silent) / sum(holds[slot] for slot in silent)
    rarity |= dict.fromkeys(silent, mean)

    def tf_idf(text: str) -> Counter[int]:
        vector: Counter[int] = Counter()
        read = extract(text)
        for kind, share in {WORD: 0.35, PAIR: 0.15, CHARACTERS: 0.5}.items():
            slots = read.slots_N[read.kinds_N == kind].tolist()
            weights = [rarity.get(slot, math.log(1 + len(texts))) ** 2 for slot in slots]
            length = math.sqrt(sum(weight**2 for weight in weights))
            for slot, weight in zip(slots, weights, strict=True):
                vector[slot] += math.sqrt(share) * weight / length  # type: ignore[assignment]
        return vector

    judged = [*dict.fromkeys(texts[:40]), *STRANGE]
    exact = torch.tensor(
        [[sum(a[slot] * b[slot] for slot in a) for b in map(tf_idf, judged)] for a in map(tf_idf, judged)]
    )
    sketch = encoder(collate([extract(text) for text in judged])).novel_BU
    table = encoder.novel_table
    for text, found in zip(judged, sketch, strict=True):
        summed = sum(weight * table[slot % len(table)] for slot, weight in tf_idf(text).items())
        assert torch.allclose(found, torch.nn.functional.normalize(torch.as_tensor(summed), dim=0), atol=1e-5)
    error = sketch @ sketch.T - exact
    # Of U directions, the standard deviation is about the square root of 1 / U, and there is no bias.
    assert float(error.std()) < 0.12
    assert abs(float(error.mean())) < 0.02
    assert int(counted.lexicon.rows[int(extract("Zyzzyva").slots_N[0])]) == UNKNOWN


def test_each_part_of_a_prototype_keeps_its_length() -> None:
    examples = torch.nn.functional.normalize(_keys(30, seed=3), dim=1)
    rows = few_shot_prototypes(examples, RowShape(WIDTH, 4))
    rows[0, WIDTH:] = 0
    moved = recentre(torch.nn.functional.normalize(_keys(30, seed=4), dim=1), rows, (WIDTH, 9))
    for part in (slice(None, WIDTH), slice(WIDTH, None)):
        assert torch.allclose(moved[:, part].norm(dim=1), rows[:, part].norm(dim=1), atol=1e-5)
    assert not torch.allclose(moved, rows, atol=0.1)


def test_trained_domains_may_know_their_own_words() -> None:
    """A sketch is added to what was trained, none rises as far, and domains are told as well as before."""
    settings = SETTINGS.model_copy(update={"sketch_share": 0.5})
    train = prompts("train", 60)
    topics = [text.split()[0] for text in train[0]]
    fit = RouterFit(*train, *prompts("val", 20), settings, num_base_parameters=1_000_000, topics=topics)
    for _ in range(fit.num_steps):
        fit.step()
    sketched = fit.finish()
    fit.settings = SETTINGS
    plain = fit.finish()
    width = plain.encoder.table.embedding_dim
    rows, bare = sketched.head.prototypes_DPV, plain.head.prototypes_DPV
    assert torch.equal(rows[..., :width], bare[..., :width])
    assert not bool(bare[..., width:].any())
    lengths = rows[..., width:].norm(dim=-1)
    assert bool(torch.isclose(lengths, torch.tensor(0.5)).logical_or(lengths == 0).all())
    texts, domains = prompts("val", 20)
    labels = torch.tensor([plain.domains.index(domain) for domain in domains])
    margins = []
    for ada in (plain, sketched):
        raw = ada.head.raw_logits(ada.encode(texts)).detach()
        assert float((raw[:, :-1].argmax(1) == labels).float().mean()) >= 0.95
        margins.append(float((raw.gather(1, labels[:, None])[:, 0] - raw[:, -1]).mean()))
    assert math.isclose(*margins, abs_tol=0.5)
    assert keys(sketched.encode(texts)).shape[1] == rows.shape[2]


def test_trained_domains_without_topics_have_no_sketches() -> None:
    settings = SETTINGS.model_copy(update={"sketch_share": 0.5})
    untold = RouterFit(*prompts("train", 60), *prompts("val", 20), settings, num_base_parameters=1_000_000)
    rows = untold.finish().head.prototypes_DPV
    assert not bool(rows[..., untold.settings.width :].any())
