"""Which features were seen in training, and which of them are worth a row of the encoder's table.

Hashed features are many and rows few, so the features that tell domains apart best get rows of their own, free of
collisions; the others are known but silent; what was never seen counts as evidence for none. Knows nothing of vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cluster.router.features import CHARACTERS, NUM_KINDS, NUM_SLOTS, PAIR, WORD, TextFeatures

UNKNOWN, SILENT = -1, -2
"""Instead of a row: never seen, and seen but without a row."""

_ROW_SHARES = {WORD: 0.35, PAIR: 0.25, CHARACTERS: 0.4}
"""Rows by kind of feature: character runs are the most and repeat each other, so they would crowd out the words."""

NUM_GROUPS = 62
"""Domains are told apart up to this many when a group of them is hidden; beyond, several share a group."""


class Lexicon(nn.Module):
    """Slot -> row, `SILENT` or `UNKNOWN`; row -> how rare its feature is. All but `rows` is saved."""

    row_slots: Tensor
    known_bits: Tensor
    rarities: Tensor
    rows: Tensor

    def __init__(self, row_slots: Tensor, known_bits: Tensor, rarities: Tensor) -> None:
        """`row_slots` int32 [R]: the slot of each row. `known_bits` uint8 [NUM_SLOTS / 8]: a bit per known slot.

        `rarities` float32 [R + 2]: of each row, of what is `SILENT` and of what is `UNKNOWN`, where these two, as
        negative indices, point.
        """
        super().__init__()
        self.register_buffer("row_slots", row_slots)
        self.register_buffer("known_bits", known_bits)
        self.register_buffer("rarities", rarities)
        known = np.unpackbits(known_bits.numpy()).astype(bool)
        rows = torch.from_numpy(np.where(known, SILENT, UNKNOWN).astype(np.int32))
        rows[row_slots.long()] = torch.arange(len(row_slots), dtype=torch.int32)
        self.register_buffer("rows", rows, persistent=False)


@dataclass(frozen=True, slots=True)
class Counted:
    """What training needs to know of each slot."""

    lexicon: Lexicon
    groups: Tensor
    """int64 [NUM_SLOTS]: bit g is set when a text of domain group g holds the slot."""
    worth: Tensor
    """float32 [NUM_SLOTS]: how much the slot says of the domain, in nats summed over the texts that hold it."""
    repeated: Tensor
    """bool [NUM_SLOTS]: held by at least two texts. A slot of one text tells that text nothing of others."""


def count(texts: Sequence[TextFeatures], domains: NDArray[np.int64], num_domains: int, num_rows: int) -> Counted:
    """The lexicon of training texts; `domains` [texts] holds numbers below `num_domains`."""
    present = [np.unique(text.slots_N) for text in texts]
    sizes = np.array([len(slots) for slots in present])
    keys = np.concatenate(present) * num_domains + np.repeat(domains, sizes)
    keys, counts = np.unique(keys, return_counts=True)
    slots, key_domains = keys // num_domains, keys % num_domains
    groups = np.zeros(NUM_SLOTS, dtype=np.int64)
    np.bitwise_or.at(groups, slots, np.left_shift(1, key_domains % NUM_GROUPS))
    num_texts = np.zeros(NUM_SLOTS, dtype=np.int64)
    np.add.at(num_texts, slots, counts)
    worth = _worth(slots, key_domains, counts, np.bincount(domains, minlength=num_domains), num_texts)
    kinds = np.zeros(NUM_SLOTS, dtype=np.int64)
    for text in texts:
        kinds[text.slots_N] = text.kinds_N
    row_slots = _choose(worth, kinds, num_texts >= 2, num_rows)
    known_bits = np.packbits(num_texts > 0)
    rarities = torch.from_numpy(_rarities(num_texts, row_slots, len(texts)))
    lexicon = Lexicon(torch.from_numpy(row_slots.astype(np.int32)), torch.from_numpy(known_bits), rarities)
    return Counted(lexicon, torch.from_numpy(groups), torch.from_numpy(worth).float(), torch.from_numpy(num_texts >= 2))


def _worth(
    slots: NDArray[np.int64],
    domains: NDArray[np.int64],
    counts: NDArray[np.int64],
    domain_sizes: NDArray[np.int64],
    num_texts: NDArray[np.int64],
) -> NDArray[np.float64]:
    """How much each slot says of the domain: texts that hold it, times KL(domains of those texts || all domains)."""
    prior = domain_sizes / domain_sizes.sum()
    gain = counts * np.log(counts / num_texts[slots] / prior[domains])
    worth = np.zeros(NUM_SLOTS)
    np.add.at(worth, slots, gain)
    return worth


def _rarities(num_texts: NDArray[np.int64], row_slots: NDArray[np.int64], num_all_texts: int) -> NDArray[np.float32]:
    """The inverse document frequency ln((1 + all texts) / (1 + texts that hold it)).

    Of each row, of what is silent on the mean of its occurrences, and of what is unknown.
    """
    rarity = np.log((1 + num_all_texts) / (1 + num_texts))
    num_silent = num_texts.copy()
    num_silent[row_slots] = 0
    unknown = np.log(1 + num_all_texts)
    silent = (rarity * num_silent).sum() / num_silent.sum() if num_silent.any() else unknown
    return np.append(rarity[row_slots], (silent, unknown)).astype(np.float32)


def _choose(
    worth: NDArray[np.float64], kinds: NDArray[np.int64], eligible: NDArray[np.bool_], num_rows: int
) -> NDArray[np.int64]:
    """The slots that get rows, best first: each kind's share, then the best of what is left."""
    ranked = np.flatnonzero(eligible)
    ranked = ranked[np.argsort(-worth[ranked], kind="stable")]
    first = [ranked[kinds[ranked] == kind][: int(num_rows * _ROW_SHARES[kind])] for kind in range(NUM_KINDS)]
    chosen = np.concatenate(first)
    rest = ranked[~np.isin(ranked, chosen)]
    return np.concatenate((chosen, rest[: num_rows - len(chosen)]))
