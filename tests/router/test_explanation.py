"""Explanations against what they claim: the text scored anew without a word, and prototypes compared by brute force."""

import numpy as np
import pytest
import torch

from cluster.errors import InvalidInput, UnknownDomain
from cluster.messages import NONE_DOMAIN
from cluster.router.explanation import NUM_NEAREST, Explanation, explain, words
from cluster.router.features import CHARACTERS, PAIR, WORD, FeatureBatch, extract
from cluster.router.head import keys
from cluster.router.tiny_ada import TinyAda
from tests.router.prompts import STRANGE, prompts
from tests.router.test_tiny_ada import NEW_TAX, TAX

TEXTS = [*prompts("val", 1, seed=3)[0], *STRANGE, "rain, rain, and RAIN!", "SELECT 12 FROM 34"]


def _margin_without(ada: TinyAda, text: str, found: Explanation, gone: set[int]) -> float:
    """The margin of `text` without the features numbered in `gone`, from a batch made feature by feature."""
    features = extract(text)
    kept = [i for i in range(len(features.slots_N)) if i not in gone]
    batch = FeatureBatch(
        torch.tensor([features.slots_N[i] for i in kept], dtype=torch.long),
        torch.tensor([features.kinds_N[i] for i in kept], dtype=torch.long),
        torch.zeros(len(kept), dtype=torch.long),
        torch.tensor([features.words_N[i] for i in kept], dtype=torch.long),
        1,
        features.num_words,
    )
    logits = dict(zip((*ada.domains, NONE_DOMAIN), ada.head(ada.encoder(batch))[0].tolist(), strict=True))
    return float(logits[found.domain] - logits[found.against])


def _features_of(text: str, kind: str, name: str) -> set[int]:
    """The numbers of the features of a part, found by comparing slots with those of the part hashed alone."""
    features = extract(text)
    in_order = words(text)
    is_pair = [kind == PAIR for kind in features.kinds_N]
    if kind == "pair":
        first, second = name.split(" ")
        around = ["·", *in_order, "·"]
        at = {i for i in range(len(around) - 1) if (around[i], around[i + 1]) == (first, second)}
        return {i for i, word in enumerate(features.words_N) if is_pair[i] and word in at}
    at = {i for i, word in enumerate(in_order) if word == name}
    letters = {i for i, word in enumerate(features.words_N) if features.kinds_N[i] == CHARACTERS and word in at}
    if kind == "letters":
        return letters
    own = {i for i, word in enumerate(features.words_N) if features.kinds_N[i] == WORD and word in at}
    slot = extract(name).slots_N[0]
    assert own == {i for i, s in enumerate(features.slots_N) if s == slot and features.kinds_N[i] == WORD}
    return (
        letters | own | {i for i, word in enumerate(features.words_N) if is_pair[i] and (word in at or word - 1 in at)}
    )


@pytest.mark.parametrize("text", TEXTS)
def test_an_effect_is_the_margin_that_goes_with_the_part(ada: TinyAda, text: str) -> None:
    found = explain(ada, text)
    assert found.margin == pytest.approx(_margin_without(ada, text, found, set()), abs=1e-4)
    parts = [(effect.kind, effect.text) for effect in found.effects]
    assert len(parts) == len(set(parts))
    assert {name for kind, name in parts if kind == "word"} == set(words(text))
    for effect in found.effects:
        without = _margin_without(ada, text, found, _features_of(text, effect.kind, effect.text))
        # Scored in fixed point, of which the last digit may fall either way.
        assert effect.effect == pytest.approx(found.margin - without, abs=1e-3), effect
    strengths = [abs(effect.effect) for effect in found.effects]
    assert strengths == sorted(strengths, reverse=True)


@pytest.mark.parametrize("text", prompts("val", 4, seed=4)[0])
def test_the_word_that_is_named_first_matters_most(ada: TinyAda, text: str) -> None:
    found = explain(ada, text)
    first = next(effect for effect in found.effects if effect.kind == "word")
    changes = {
        word: abs(found.margin - _margin_without(ada, text, found, _features_of(text, "word", word)))
        for word in set(words(text))
    }
    assert changes[first.text] == pytest.approx(max(changes.values()), abs=1e-4)
    rest = " ".join(word for word in words(text) if word != first.text)
    logits = dict(zip((*ada.domains, NONE_DOMAIN), ada.logits([rest])[0].tolist(), strict=True))
    typed = logits[found.domain] - logits[NONE_DOMAIN]
    assert (found.margin - typed) * first.effect > 0, "typed without it, the text moves the same way"


def test_the_decision_is_the_routers_and_the_domain_its_best(ada: TinyAda) -> None:
    for text in TEXTS:
        found, (decision,) = explain(ada, text), ada.route([text])
        assert (found.decision.probabilities, found.decision.weights) == (decision.probabilities, decision.weights)
        real = {name: p for name, p in decision.probabilities.items() if name != NONE_DOMAIN}
        assert found.domain == max(real, key=real.__getitem__)
        assert (found.margin >= found.threshold) == bool(decision.weights)


def test_another_domain_may_be_what_it_is_compared_with(ada: TinyAda) -> None:
    text = "Play the song on the piano"
    logits = dict(zip((*ada.domains, NONE_DOMAIN), ada.logits([text])[0].tolist(), strict=True))
    assert explain(ada, text, against="sql").margin == pytest.approx(logits["music"] - logits["sql"], abs=1e-4)
    with pytest.raises(UnknownDomain, match="'opera'"):
        explain(ada, text, against="opera")
    with pytest.raises(InvalidInput, match="best domain itself"):
        explain(ada, text, against="music")
    empty = ada
    for domain in ada.domains:
        empty = empty.without_domain(domain)
    with pytest.raises(InvalidInput, match="knows no domain"):
        explain(empty, text)


def test_the_nearest_prototypes_are_the_nearest(ada: TinyAda) -> None:
    grown = ada.with_domain("tax", TAX)
    for text in (*TEXTS, *NEW_TAX):
        key = keys(grown.encode([text]))[0].detach().numpy()
        products = [
            (float(np.dot(grown.head.prototypes_DPV[d, p].numpy(), key)), name, p)
            for d, name in enumerate(grown.domains)
            for p in range(int(grown.head.num_prototypes_D[d]))
        ]
        expected = sorted(products, reverse=True)[:NUM_NEAREST]
        found = explain(grown, text).nearest
        assert [near.product for near in found] == pytest.approx([product for product, _, _ in expected], abs=1e-5)
        by_place = {(name, number): product for product, name, number in products}
        for near in found:
            assert near.product == pytest.approx(by_place[near.domain, near.number], abs=1e-5)


def test_words_never_seen_explain_a_domain_added_from_examples(ada: TinyAda) -> None:
    found = explain(ada.with_domain("tax", TAX), "When must I file a tax return?")
    assert found.domain == "tax"
    helpful = [effect.text for effect in found.effects if effect.kind == "word" and effect.effect > 0]
    assert {"tax", "return"} & set(helpful[:3])


def test_work_is_bounded_whatever_the_text(ada: TinyAda) -> None:
    long = explain(ada, "rain " * 200_000)
    assert len(long.effects) < 10
    many = explain(ada, "".join(chr(0x1F300 + i) for i in range(768)))
    assert len([effect for effect in many.effects if effect.kind == "word"]) == 768
    assert all(np.isfinite(effect.effect) for effect in many.effects)
    assert {effect.text for effect in explain(ada, "").effects} == {"· ·"}
