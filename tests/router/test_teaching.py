"""Tiny ada taught by a pretrained sentence encoder: what she takes from it, and what stays as without."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config.training import RouterSettings
from cluster.errors import InvalidInput
from cluster.messages import NONE_DOMAIN
from cluster.router.encoder import Encoder
from cluster.router.explanation import explain, words
from cluster.router.features import WORD, collate, extract
from cluster.router.fit import RouterFit
from cluster.router.sentence_encoder import read
from cluster.router.sentence_model import SentenceModel
from cluster.router.teaching import Teaching
from cluster.router.tiny_ada import TinyAda
from cluster.router.word_vectors import WORD_WIDTH, WordVectors
from tests.router.prompts import STRANGE, prompts
from tests.router.small_bert import WIDTH, small_bert
from tests.router.test_tiny_ada import NEW_TAX, TAX, _answers, _share

NUM_BASE_PARAMETERS = 10_000_000
PROMPTS, _ = prompts("val", 5)

ALIKE = {
    "cooking": "bake soup spice fry pan recipe simmer oregano casserole",
    "music": "song piano chord sing melody notes sonata tuba crescendo",
    "sql": "select table query rows count join null subquery cursor tuples",
    "weather": "rain forecast snow temperature windy drizzle humidity hail",
}
UNSEEN = {
    "simmer the casserole with oregano": "cooking",
    "sonata for tuba": "music",
    "a subquery with a cursor over tuples": "sql",
    "drizzle or hail , and humidity": "weather",
}


class Thesaurus(SentenceModel):
    """Knows which words are alike: those of one line of `ALIKE` point one way, every other word a way of its own."""

    def __init__(self) -> None:
        self.width = 48
        self._field_of = {word: field for field, words in ALIKE.items() for word in words.split()}

    def words(self) -> list[str]:
        return list(self._field_of)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        sums = [sum((self._vector(word) for word in words(text)), torch.zeros(self.width)) for text in texts]
        return torch.nn.functional.normalize(torch.stack(sums), dim=1)

    def _vector(self, word: str) -> torch.Tensor:
        vector = 0.3 * self._direction(word)
        return vector + self._direction(self._field_of[word]) if word in self._field_of else vector

    def _direction(self, name: str) -> torch.Tensor:
        return torch.randn(self.width, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> SentenceModel:
    return small_bert(tmp_path_factory.mktemp("small-bert"))


def _fit(teacher: SentenceModel, **changes: object) -> RouterFit:
    settings = RouterSettings(steps=80, batch_size=64, prototypes_per_domain=4, teacher="the one given")
    settings = settings.model_copy(update=changes)
    return RouterFit(*prompts("train", 60), *prompts("val", 20), settings, NUM_BASE_PARAMETERS, sentences=teacher)


@pytest.fixture(scope="module")
def taught() -> TinyAda:
    """A trained router. Read it; do not change it."""
    run = _fit(Thesaurus())
    for _ in range(run.num_steps):
        run.step()
    return run.finish()


def _words(ada: TinyAda) -> WordVectors:
    assert isinstance(ada.encoder, Encoder)
    assert ada.encoder.words is not None
    return ada.encoder.words


def test_unseen_sentences_reach_their_domain_and_strange_ones_none(taught: TinyAda) -> None:
    texts, domains = prompts("val", 30, seed=1)
    assert _share(_answers(taught.route(texts)), domains) >= 0.95
    assert _answers(taught.route(STRANGE)).count(NONE_DOMAIN) >= len(STRANGE) - 2


def test_words_that_only_the_teacher_knew_reach_their_domain(taught: TinyAda) -> None:
    logits = taught.logits(list(UNSEEN))
    found = [taught.domains[number] for number in logits[:, :-1].argmax(dim=1).tolist()]
    assert found == list(UNSEEN.values())
    known = set(words(" ".join(prompts("train", 60)[0])))
    assert not known & {word for line in ALIKE.values() for word in line.split()[-3:]}


def test_words_lie_to_each_other_as_the_teacher_says(bert: SentenceModel) -> None:
    some = ["rain", "snow", "soup", "piano", "rows", "lamp", "query", "spice"]
    vectors = WordVectors.taken_from(bert, [" ".join(some)], most_words=len(some), width=16)
    sentences = bert.embed(some)
    centred = sentences - sentences.mean(0)
    # Fewer words than directions: nothing is lost, so the angles are those of the centred sentences.
    cosines = torch.nn.functional.cosine_similarity(centred[:, None], centred[None], dim=-1)
    found = vectors.vectors_YQ.float()
    assert found.shape == (len(some), min(WORD_WIDTH, WIDTH))
    assert torch.allclose(found @ found.T, cosines, atol=5e-3)


def test_frequent_words_of_the_texts_come_before_the_teachers_own(bert: SentenceModel) -> None:
    texts = ["zebra zebra quokka 1234 !", "zebra quokka ibex"]
    slots = [int(extract(word).slots_N[0]) for word in ("zebra", "quokka", "ibex")]
    taken = WordVectors.taken_from(bert, texts, most_words=10, width=16).slots_Y.tolist()
    assert taken[:3] == slots
    assert len(taken) == len(set(taken)) == 10
    assert WordVectors.taken_from(bert, texts, most_words=2, width=16).slots_Y.tolist() == slots[:2]


def test_a_text_gets_what_its_known_words_say_together(bert: SentenceModel) -> None:
    vectors = WordVectors.taken_from(bert, ["soup rain snow"], most_words=3, width=16)
    batch = collate([extract("Soup, or rain?"), extract("nothing known")])
    weights = torch.rand(len(batch.slots_N), generator=torch.Generator().manual_seed(0))
    slot_of = {word: int(extract(word).slots_N[0]) for word in ("soup", "rain")}
    total = torch.zeros(vectors.vectors_YQ.shape[1])
    for slot, kind, weight in zip(batch.slots_N.tolist(), batch.kinds_N.tolist(), weights, strict=True):
        if kind == WORD and slot in slot_of.values():
            total += weight * vectors.vectors_YQ[vectors.slots_Y.tolist().index(slot)].float()
    expected = vectors.down(torch.nn.functional.gelu(vectors.up(4 * torch.stack((total, torch.zeros_like(total))))))
    assert torch.allclose(vectors(batch, weights), expected, atol=1e-6)


def test_the_loss_is_one_less_the_cosine_to_what_the_teacher_says_beyond_the_mean(bert: SentenceModel) -> None:
    texts = read(PROMPTS, bert)
    teaching = Teaching(texts, width=16)
    z = torch.randn(len(PROMPTS), 16, generator=torch.Generator().manual_seed(0))
    counted = torch.arange(len(PROMPTS)) % 3 > 0
    vectors = np.stack([text.sentence_S for text in texts if text.sentence_S is not None]).astype(np.float64)
    projected = (z.double() @ teaching.projection.weight.double().T).detach().numpy()
    centred = vectors - vectors.mean(axis=0)
    lengths = np.linalg.norm(projected, axis=1) * np.linalg.norm(centred, axis=1)
    losses = 1 - (projected * centred).sum(axis=1) / lengths
    expected = 10 * losses[counted.numpy()].mean()
    assert teaching.loss(z, collate(texts), counted).item() == pytest.approx(expected, rel=1e-4)
    assert teaching.loss(z, collate(texts), torch.zeros(len(PROMPTS), dtype=torch.bool)).item() == 0


def test_training_brings_the_texts_to_where_the_teacher_has_them() -> None:
    texts = read(PROMPTS, Thesaurus())
    run = _fit(Thesaurus())
    teaching = run._teaching
    assert teaching is not None
    batch, everything = collate(texts), torch.ones(len(PROMPTS), dtype=torch.bool)

    def distance() -> float:
        return teaching.loss(run.encoder(batch).z_BW, batch, everything).item()

    before = distance()
    for _ in range(run.num_steps):
        run.step()
    assert distance() < before / 2


def test_saved_and_loaded_it_is_the_same_and_needs_no_teacher(taught: TinyAda, tmp_path: Path) -> None:
    taught.save(tmp_path)
    loaded = TinyAda.load(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["router.json", "router.safetensors"]
    assert torch.equal(loaded.logits([*PROMPTS, *STRANGE]), taught.logits([*PROMPTS, *STRANGE]))
    assert loaded.num_parameters == taught.num_parameters
    assert explain(loaded, PROMPTS[0]).effects == explain(taught, PROMPTS[0]).effects


def test_what_the_teacher_said_of_words_is_within_the_routers_share(taught: TinyAda) -> None:
    numbers = _words(taught).vectors_YQ.numel()
    assert numbers <= 0.3 * 0.04 * NUM_BASE_PARAMETERS
    assert taught.num_parameters <= 0.04 * NUM_BASE_PARAMETERS
    assert taught.num_parameters == numbers + sum(parameter.numel() for parameter in taught.parameters())


def test_a_domain_is_added_and_no_other_logit_changes(taught: TinyAda) -> None:
    grown = taught.with_domain("tax", TAX)
    kept = [grown.domains.index(name) for name in taught.domains]
    texts = [*PROMPTS, *STRANGE]
    assert torch.equal(grown.logits(texts)[:, kept], taught.logits(texts)[:, :-1])
    assert _share(_answers(grown.route(NEW_TAX)), ["tax"] * len(NEW_TAX)) >= 0.5


def test_a_resumed_run_is_the_unbroken_one() -> None:
    unbroken, broken = _fit(Thesaurus(), steps=12), _fit(Thesaurus(), steps=12)
    for _ in range(6):
        unbroken.step()
        broken.step()
    resumed = _fit(Thesaurus(), steps=12)
    resumed.load_state_dict(broken.state_dict())
    assert [resumed.step() for _ in range(6)] == [unbroken.step() for _ in range(6)]


def test_what_reads_each_prompt_is_no_teacher() -> None:
    with pytest.raises(InvalidInput, match="name one of them"):
        _fit(Thesaurus(), sentence_encoder="another")
