"""Why a prompt was routed as it was: the nearest prototypes, and what each of its words and pairs of words did.

The effect of a word is measured, not estimated: the text's features are scored once more without it. Features are
hashed, so what they were is taken from the text again. Knows nothing of adapters or versions. Letters: N features,
U units, C domains + 1, V width of a prototype, P prototypes of all domains.
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
from cluster.router.features import CHARACTERS, PAIR, TOKEN, TextFeatures, collate, extract, normalise
from cluster.router.head import keys
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
    cosine: float
    """What the head makes of the two: their cosine, the text's vector taken at unit length whatever is novel in it."""


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
    features = extract(text)
    parts = list(_parts(text, features))
    whole = np.zeros(len(features.slots_N), dtype=bool)
    logits_UC = _logits_without(ada, features, [whole, *(left_out for _, _, left_out in parts)])
    best = int(logits_UC[0, :-1].argmax())
    if ada.domains[best] == against:
        raise InvalidInput(f"{against!r} is the best domain itself; compare it with another, or with {NONE_DOMAIN}.")
    other = len(ada.domains) if against == NONE_DOMAIN else ada.domains.index(against)
    margins = (logits_UC[:, best] - logits_UC[:, other]).tolist()
    effects = [Effect(kind, name, margins[0] - m) for (kind, name, _), m in zip(parts, margins[1:], strict=True)]
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


def _parts(text: str, features: TextFeatures) -> Iterator[tuple[Kind, str, NDArray[np.bool_]]]:
    """Kind and text of every distinct part of the text, and which features [N] go with it."""
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
        yield "word", word, np.isin(features.words_N, at) | (is_pair_N & np.isin(features.words_N - 1, at))
        yield "letters", word, (features.kinds_N == CHARACTERS) & np.isin(features.words_N, at)
    for name, at in pairs.items():
        yield "pair", name, is_pair_N & np.isin(features.words_N, at)


def _logits_without(ada: TinyAda, features: TextFeatures, left_out: Sequence[NDArray[np.bool_]]) -> Tensor:
    """[U, C]: the logits of the text without each of these sets of features.

    Left out, not marked as never seen: of a domain added from examples it is words never seen that decide.
    """
    per_batch = max(1, _MAX_BATCH_FEATURES // max(1, len(features.slots_N)))
    logits = []
    for start in range(0, len(left_out), per_batch):
        texts = [
            TextFeatures(
                features.slots_N[~out_N], features.kinds_N[~out_N], features.words_N[~out_N], features.num_words
            )
            for out_N in left_out[start : start + per_batch]
        ]
        logits.append(ada.head(ada.encoder(collate(texts))))
    return torch.cat(logits)


def _nearest(ada: TinyAda, text: str) -> tuple[NearPrototype, ...]:
    key_V = keys(ada.encode([text]))[0]
    products_DP = ada.head.prototypes_DPV @ key_V
    padding_DP = torch.arange(products_DP.shape[1]) >= ada.head.num_prototypes_D[:, None]
    products_P = products_DP.masked_fill(padding_DP, -torch.inf).flatten()
    num_nearest = min(NUM_NEAREST, int(ada.head.num_prototypes_D.sum()))
    top = products_P.topk(num_nearest)
    return tuple(
        NearPrototype(ada.domains[index // products_DP.shape[1]], index % products_DP.shape[1], cosine)
        for index, cosine in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
