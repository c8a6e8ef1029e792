"""What the encoder's vector is before anything was learned."""

import numpy as np
import torch

from cluster.router.encoder import Encoder
from cluster.router.features import collate, extract
from cluster.router.lexicon import count
from tests.router.prompts import DOMAINS, prompts


def test_the_block_starts_as_the_identity() -> None:
    texts, domains = prompts("train", 60)
    features = [extract(text) for text in texts]
    numbers = np.array([DOMAINS.index(name) for name in domains])
    lexicon = count(features, numbers, len(DOMAINS) + 1, num_rows=300).lexicon
    encoder = Encoder(lexicon, len(lexicon.row_slots), width=16)
    text = extract("Fry the basket in a pan")
    rows_N = lexicon.rows[text.slots_N]
    sizes_K = np.bincount(text.kinds_N, minlength=3)
    bag_W = torch.zeros(16)
    for row, kind in zip(rows_N.tolist(), text.kinds_N.tolist(), strict=True):
        if row >= 0:
            bag_W += encoder.table.weight[row].detach() / float(sizes_K[kind]) ** 0.5
    z_W = encoder(collate([text])).z_BW[0]
    assert torch.allclose(z_W, torch.nn.functional.normalize(bag_W, dim=0), atol=1e-5)
