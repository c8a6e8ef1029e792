"""Examples of a domain that training never saw -> its prototypes and, where words are the sketch, its offset. Knows
nothing of text.

Such a domain is told by the sketch of its words more than by the encoder's vector, which was trained to tell others.
Letters: N examples, P prototypes, W width of the vector, V width of the vector and the sketch together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.router.head import domain_logits
from cluster.router.prototypes import cluster_prototypes

VECTOR_LENGTH = 0.7
"""Of the vector in a prototype, beside the sketch's 1."""

LENGTH_BESIDE_SENTENCE = 0.55
"""Of the vector, where the sketch is a sentence's, which says more: as long as leaves nothing for an offset to do."""

_SHARE_OF_GAP = 0.4
"""How much of what a new domain's logits lack beside those of known domains its offset makes up for. All of it would
take as many prompts from the known domains as it finds of its own."""

_EXAMPLES_TO_PASS = 0.95
"""Share of the examples that need pass none; for more there is no offset."""

_FOLDS = 5


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a new domain's prototypes are like."""

    width: int
    """Numbers of a key that are its vector; the rest are its sketch."""
    most: int
    """Prototypes of one domain, where no topics say how many."""
    vector_length: float = VECTOR_LENGTH


def few_shot_prototypes(keys_NV: Tensor, shape: RowShape, topics: Sequence[str] | None = None) -> Tensor:
    """[P, V]: one per topic; without topics, or with a single one, at most `shape.most` by clustering."""
    owner_N = _owners(keys_NV, shape, topics)
    sums_PV = keys_NV.new_zeros(int(owner_N.max()) + 1, keys_NV.shape[1]).index_add_(0, owner_N, keys_NV)
    return _balanced(sums_PV[owner_N.bincount() > 0], shape)


def few_shot_offset(own_N: Tensor, none_N: Tensor, known_logit: Tensor) -> Tensor:
    """What is to be added to the domain's logits, of which `own_N` are those that `few_shot_logits` gives.

    `none_N` is what the examples need to pass none, `known_logit` the mean logit of known domains' prompts for them.
    """
    gap = _SHARE_OF_GAP * (known_logit - own_N.mean())
    return torch.minimum(gap, (none_N - own_N).quantile(_EXAMPLES_TO_PASS))


def few_shot_logits(keys_NV: Tensor, shape: RowShape, topics: Sequence[str] | None = None) -> Tensor:
    """[N]: the examples' logits for their own domain, each judged by prototypes that were made without it."""
    folds_N = _folds(len(keys_NV), topics)
    own_N = torch.empty(len(keys_NV))
    for fold in folds_N.unique():
        judged_N = folds_N == fold
        kept_N = ~judged_N if bool((~judged_N).any()) else judged_N
        kept_topics = topics and [topics[index] for index in kept_N.nonzero().flatten().tolist()]
        rows_PV = few_shot_prototypes(keys_NV[kept_N], shape, kept_topics)
        own_N[judged_N] = domain_logits(keys_NV[judged_N], rows_PV[None], torch.tensor([len(rows_PV)]))[:, 0]
    return own_N


def _owners(keys_NV: Tensor, shape: RowShape, topics: Sequence[str] | None) -> Tensor:
    """int64 [N]: the number of each example's prototype."""
    if topics and len(set(topics)) > 1:
        numbers = {name: number for number, name in enumerate(sorted(set(topics)))}
        return torch.tensor([numbers[name] for name in topics])
    balanced_NV = _balanced(keys_NV, shape)
    return (balanced_NV @ cluster_prototypes(balanced_NV, shape.most).T).argmax(1)


def _folds(num_examples: int, topics: Sequence[str] | None) -> Tensor:
    """int64 [N]: the fold of each example, the examples of a topic spread over all of them."""
    num_folds = min(_FOLDS, num_examples)
    seen: dict[str, int] = {}
    folds = []
    for topic in topics or [""] * num_examples:
        folds.append(seen.get(topic, 0) % num_folds)
        seen[topic] = seen.get(topic, 0) + 1
    return torch.tensor(folds)


def _balanced(keys_NV: Tensor, shape: RowShape) -> Tensor:
    """Both parts at the lengths that they have in a prototype."""
    parts = keys_NV.tensor_split([shape.width], dim=1)
    vector_NW, sketch_NU = (nn.functional.normalize(part, dim=1) for part in parts)
    return torch.cat((shape.vector_length * vector_NW, sketch_NU), dim=1)
