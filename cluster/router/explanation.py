"""Why a prompt was routed as it was: the nearest prototypes, and what each of its words and pairs of words did.

The effect of a word is measured, not estimated: the text's features are scored once more without it, and a sentence
encoder, where there is one, reads the text without it. Features are hashed, so what they were is taken from the text
again. Knows nothing of adapters or versions. Letters: N features, U units, C domains + 1, V width of a prototype, P
prototypes of all domains, B texts, S width of a sentence's vector.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import InvalidInput, UnknownDomain
from cluster.messages import NONE_DOMAIN, RoutingDecision
from cluster.router.features import CHARACTERS, PAIR, TOKEN, TextFeatures, collate, normalise, window
from cluster.router.head import keys
from cluster.router.sentence_encoder import SentenceEncoder
from cluster.router.tiny_ada import TinyAda

NUM_NEAREST = 5

_EDGE = "·"
_MAX_BATCH_FEATURES = 2**18
"""Texts of very many words are scored without each of them in several batches."""

Kind = Literal["word", "letters", "pair"]
"""A word with its runs of characters and its pairs, those runs alone, or two neighbouring words as a pair."""


@dataclass(frozen=True, slots=True)
class NearPrototype:
    """A prototype that lies near the text."""

    domain: str
    number: int
    """Which of the domain's prototypes, from 0."""
    product: float
    """What the head makes of the two: the cosine of their vectors, and where the prototype has a sketch of rare words
    the sketches' too, each as much as the prototype's part is long.
    """


@dataclass(frozen=True, slots=True)
class Effect:
    """What a part of the text did; the same part may occur in it more than once."""

    kind: Kind
    text: str
    """As the router reads it: lower case, each digit 0, `·` for the edge of the text."""
    effect: float
    """How much of the margin goes when the text is scored without it; negative when the margin grows."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One decision and its grounds."""

    decision: RoutingDecision
    domain: str
    """The domain with the largest logit, selected or not."""
    is_data_free: bool
    """Whether that domain is known by words of its adapter alone."""
    against: str
    """What it is compared with: none, or another domain."""
    margin: float
    """The domain's logit minus the other one's."""
    threshold: float
    """A domain is selected when its logit exceeds none's by at least this."""
    nearest: tuple[NearPrototype, ...]
    """The nearest first."""
    effects: tuple[Effect, ...]
    """The strongest first, whether they speak for the domain or against it."""


@torch.inference_mode()
def explain(ada: TinyAda, text: str, against: str = NONE_DOMAIN) -> Explanation:
    """Why `ada` decides as it does on `text`, and what of it speaks for the best domain and not for `against`.

    Raises `UnknownDomain` for an `against` that the router does not know, `InvalidInput` when it knows no domain, or
    when the best domain would be compared with itself.
    """
    if not ada.domains:
        raise InvalidInput("The router knows no domain, so there is nothing to explain; add one, or train it.")
    if against not in (*ada.domains, NONE_DOMAIN):
        raise UnknownDomain(f"The router knows no domain {against!r}; it knows {', '.join(ada.domains)}.")
    (decision,) = ada.route([text])
    (features,) = ada.encoder.read([text])
    parts = list(_parts(text, features))
    logits_UC = _logits(ada, [features, *_without_each(ada, text, features, parts)])
    best = int(logits_UC[0, :-1].argmax())
    if ada.domains[best] == against:
        raise InvalidInput(f"{against!r} is the best domain itself; compare it with another, or with {NONE_DOMAIN}.")
    other = len(ada.domains) if against == NONE_DOMAIN else ada.domains.index(against)
    margins = (logits_UC[:, best] - logits_UC[:, other]).tolist()
    effects = [Effect(part.kind, part.text, margins[0] - m) for part, m in zip(parts, margins[1:], strict=True)]
    return Explanation(
        decision,
        ada.domains[best],
        ada.domains[best] in ada.data_free,
        against,
        margins[0],
        ada.policy.threshold,
        _nearest(ada, text),
        tuple(sorted(effects, key=lambda effect: -abs(effect.effect))),
    )


def words(text: str) -> list[str]:
    """The words of `text` as the router reads them, in order: punctuation counts as words."""
    return TOKEN.findall(normalise(text))


@dataclass(frozen=True, slots=True)
class _Part:
    kind: Kind
    text: str
    features_N: NDArray[np.bool_]
    """Those that go with it."""
    words: tuple[int, ...] = ()
    """Those that a sentence encoder no longer reads; letters and pairs are nothing to it."""


def _parts(text: str, features: TextFeatures) -> Iterator[_Part]:
    """Every distinct part of the text."""
    in_order = words(text)
    assert len(in_order) + 1 == features.num_words, "the words are those that were hashed"
    positions: dict[str, list[int]] = {}
    pairs: dict[str, list[int]] = {}
    for position, word in enumerate(in_order):
        positions.setdefault(word, []).append(position)
    # A pair belongs to its second word, the last one to the end of the text.
    for second, pair in enumerate(zip([_EDGE, *in_order], [*in_order, _EDGE], strict=True)):
        pairs.setdefault(" ".join(pair), []).append(second)
    is_pair_N = features.kinds_N == PAIR
    for word, at in positions.items():
        with_pairs_N = np.isin(features.words_N, at) | (is_pair_N & np.isin(features.words_N - 1, at))
        yield _Part("word", word, with_pairs_N, tuple(at))
        yield _Part("letters", word, (features.kinds_N == CHARACTERS) & np.isin(features.words_N, at))
    for name, at in pairs.items():
        yield _Part("pair", name, is_pair_N & np.isin(features.words_N, at))


def _without_each(ada: TinyAda, text: str, features: TextFeatures, parts: Sequence[_Part]) -> list[TextFeatures]:
    """The text without each of these parts.

    Left out, not marked as never seen: of a domain added from examples it is words never seen that decide.
    """
    sentences = _sentences_without_each(ada, text, parts)
    return [
        TextFeatures(
            features.slots_N[~part.features_N],
            features.kinds_N[~part.features_N],
            features.words_N[~part.features_N],
            features.num_words,
            sentences.get(part.words, features.sentence_S),
        )
        for part in parts
    ]


def _sentences_without_each(
    ada: TinyAda, text: str, parts: Sequence[_Part]
) -> dict[tuple[int, ...], NDArray[np.float32]]:
    """By the words that are left out, what a sentence encoder makes of the others; nothing where there is none."""
    if not isinstance(ada.encoder, SentenceEncoder):
        return {}
    left_out = [part.words for part in parts if part.words]
    vectors_BS = ada.encoder.sentences.embed([_without_words(text, at) for at in left_out]).numpy()
    return dict(zip(left_out, vectors_BS, strict=True))


def _without_words(text: str, left_out: Sequence[int]) -> str:
    """What is read of the text, without these words, of which the first is 0."""
    written, normal = window(text), normalise(text)
    spans = [match.span() for match in TOKEN.finditer(normal)]
    # The words are found in the normal form, which for nearly all texts is as long as what was written.
    source = written if len(written) == len(normal) else normal
    pieces, end = [], 0
    for word in left_out:
        pieces.append(source[end : spans[word][0]])
        end = spans[word][1]
    return "".join((*pieces, source[end:]))


def _logits(ada: TinyAda, texts: Sequence[TextFeatures]) -> Tensor:
    """[U, C], of texts none of which is longer than the first."""
    per_batch = max(1, _MAX_BATCH_FEATURES // max(1, len(texts[0].slots_N)))
    batches = [collate(texts[start : start + per_batch]) for start in range(0, len(texts), per_batch)]
    return torch.cat([ada.head(ada.encoder(batch)) for batch in batches])


def _nearest(ada: TinyAda, text: str) -> tuple[NearPrototype, ...]:
    key_V = keys(ada.encode([text]))[0]
    products_DP = ada.head.prototypes_DPV @ key_V
    padding_DP = torch.arange(products_DP.shape[1]) >= ada.head.num_prototypes_D[:, None]
    products_P = products_DP.masked_fill(padding_DP, -torch.inf).flatten()
    num_nearest = min(NUM_NEAREST, int(ada.head.num_prototypes_D.sum()))
    top = products_P.topk(num_nearest)
    return tuple(
        NearPrototype(ada.domains[index // products_DP.shape[1]], index % products_DP.shape[1], product)
        for index, product in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
