"""The encoder's vector against the formula it stands for, feature by feature."""

from collections import defaultdict

import numpy as np
import torch

from cluster.router.encoder import Encoder
from cluster.router.features import collate, extract
from cluster.router.lexicon import SILENT, UNKNOWN, Lexicon, count
from tests.router.prompts import DOMAINS, prompts

WIDTH = 16


def _lexicon() -> Lexicon:
    texts, domains = prompts("train", 60)
    numbers = np.array([DOMAINS.index(name) for name in domains])
    return count([extract(text) for text in texts], numbers, len(DOMAINS) + 1, num_rows=300).lexicon


def _tfidf_bag(encoder: Encoder, text: str) -> torch.Tensor:
    """[W]: rows of the table, each times its rarity over the root of the sum of squares of its kind's rarities."""
    lexicon, features = encoder.lexicon, extract(text)
    squares: defaultdict[int, float] = defaultdict(float)
    for slot, kind in zip(features.slots_N, features.kinds_N, strict=True):
        squares[kind] += float(lexicon.rarities[lexicon.rows[slot]]) ** 2
    bag_W = torch.zeros(WIDTH)
    for slot, kind in zip(features.slots_N, features.kinds_N, strict=True):
        row = int(lexicon.rows[slot])
        if row >= 0:
            bag_W += encoder.table.weight[row].detach() * float(lexicon.rarities[row]) / squares[kind] ** 0.5
    return bag_W


def test_the_vector_is_a_sum_weighted_by_rarity_and_the_block_starts_as_the_identity() -> None:
    lexicon = _lexicon()
    text = "Fry the basket, penicillin and a recipe for soup"
    kinds = {int(min(row, 0)) for row in lexicon.rows[extract(text).slots_N]}
    assert kinds == {0, SILENT, UNKNOWN}, "features with a row, without one, and never seen"
    encoder = Encoder(lexicon, len(lexicon.row_slots), WIDTH)
    encoding = encoder(collate([extract(text), extract("Sing the song")]))
    expected_W = torch.nn.functional.normalize(_tfidf_bag(encoder, text), dim=0)
    assert torch.allclose(encoding.z_BW[0], expected_W, atol=1e-5)


def test_a_rare_word_weighs_more_than_a_frequent_one() -> None:
    lexicon = _lexicon()
    encoder = Encoder(lexicon, len(lexicon.row_slots), WIDTH)
    words = ("where", "is")
    slots = [int(extract(word).slots_N[0]) for word in words]
    rows = [int(lexicon.rows[slot]) for slot in slots]
    assert min(rows) >= 0
    rarer, commoner = sorted(rows, key=lambda row: -float(lexicon.rarities[row]))
    assert lexicon.rarities[rarer] > lexicon.rarities[commoner]
    with torch.no_grad():
        encoder.table.weight.zero_()
        encoder.table.weight[rarer, 0] = 1.0
        encoder.table.weight[commoner, 1] = 1.0
    z_W = encoder(collate([extract("where is")])).z_BW[0]
    assert torch.isclose(z_W[0] / z_W[1], lexicon.rarities[rarer] / lexicon.rarities[commoner])
