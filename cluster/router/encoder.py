"""Features -> one unit vector per text, a sketch of what is rare in it, and the evidence of how much was ever seen.

Knows nothing of domains. Letters: N features, B texts, W width of the vector, U width of the sketch, C cells (text and
kind), K kinds, E evidence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.router.episodes import Episode
from cluster.router.features import CHARACTERS, NUM_KINDS, PAIR, WORD, FeatureBatch, TextFeatures, extract
from cluster.router.lexicon import SILENT, UNKNOWN, Lexicon
from cluster.router.naive_bayes import NaiveBayes
from cluster.router.word_vectors import WordVectors

NUM_EVIDENCE = NUM_KINDS + 2

NOVEL_WIDTH = 128
_NOVEL_ROWS = 4096
_NOVEL_SEED = 5
_NOVEL_SHARES = {WORD: 0.35, PAIR: 0.15, CHARACTERS: 0.5}
"""Of the sketch's squared length, by kind of feature."""
_INITIAL_STD = 0.05
_LENGTH_FLOOR = 0.1
_SQUARE_FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class Encoding:
    """What the head reads of texts."""

    z_BW: Tensor
    """Unit vectors; zero for a text without any feature that has a row."""
    novel_BU: Tensor
    """A sketch of the text's TF-IDF vector, words never seen weighing most, so that products of two sketches are about
    those of the vectors' directions; unit vectors.
    """
    evidence_BE: Tensor
    """Share of known features by kind, log length of the n-grams' vector before normalising, log number of features."""
    votes_BW: Tensor | None = None
    """In training: the vectors that naive Bayes alone gives."""


class Encoder(nn.Module):
    """A bag of feature vectors, then a feed-forward block beside the identity, then a unit vector; where there is naive
    Bayes its vector is added, and the sum is made a unit vector again.
    """

    def __init__(
        self,
        lexicon: Lexicon,
        num_rows: int,
        width: int,
        words: WordVectors | None = None,
        votes: NaiveBayes | None = None,
    ) -> None:
        """`num_rows` may exceed the lexicon's rows when training saw fewer features; the rest stay unused.

        `words`: what a teacher said of single words. `votes`: what counting says.
        """
        super().__init__()
        self.lexicon = lexicon
        self.table = nn.Embedding(num_rows, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.words = words
        self.votes = votes
        nn.init.normal_(self.table.weight, std=_INITIAL_STD)
        # The block starts as the identity.
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        # Fixed, not learned: a domain added from examples is recognised by words that training never saw.
        directions = torch.randn(_NOVEL_ROWS, NOVEL_WIDTH, generator=torch.Generator().manual_seed(_NOVEL_SEED))
        self.register_buffer("novel_table", directions / NOVEL_WIDTH**0.5, persistent=False)
        shares = torch.tensor([_NOVEL_SHARES[kind] for kind in range(NUM_KINDS)])
        self.register_buffer("novel_shares_K", shares, persistent=False)

    novel_table: Tensor
    novel_shares_K: Tensor

    @property
    def width(self) -> int:
        """Numbers of a text's vector."""
        return self.table.embedding_dim

    def read(self, texts: Sequence[str]) -> list[TextFeatures]:
        """What the encoder reads of each text."""
        return [extract(text) for text in texts]

    def forward(self, batch: FeatureBatch, episode: Episode | None = None) -> Encoding:
        """Encode a batch, in training as the step's episode shows it: its hidden features are taken for never seen, its
        silent ones for known ones without a row.
        """
        rows_N = self.lexicon.rows[batch.slots_N].long()
        if episode is not None:
            rows_N = torch.where(episode.silent_N & (rows_N >= 0), SILENT, rows_N)
            rows_N = rows_N.masked_fill(episode.hidden_N, UNKNOWN)
        cells_N = batch.texts_N * NUM_KINDS + batch.kinds_N
        num_cells = batch.num_texts * NUM_KINDS
        all_C = torch.bincount(cells_N, minlength=num_cells)
        known_C = torch.bincount(cells_N[rows_N != UNKNOWN], minlength=num_cells)
        # Divided by all features of the kind, also the unknown: what is unknown dilutes what is known.
        weights_N = all_C.float().rsqrt()[cells_N]
        kept_N = rows_N >= 0
        bag_BW = _bag(self.table.weight, rows_N, batch, kept_N, weights_N)
        length_B1 = torch.linalg.vector_norm(bag_BW, dim=1, keepdim=True)
        if self.words is not None:
            bag_BW = bag_BW + self.words(batch, weights_N)
        h_BW = bag_BW + self.down(nn.functional.gelu(self.up(bag_BW)))
        all_BK = all_C.view(-1, NUM_KINDS)
        share_BK = known_C.view(-1, NUM_KINDS) / all_BK.clamp(min=1)
        size_B1 = all_BK.sum(1, keepdim=True).log1p() / 4
        evidence_BE = torch.cat((share_BK, (length_B1 + _LENGTH_FLOOR).log(), size_B1), dim=1)
        z_BW, votes_BW = nn.functional.normalize(h_BW, dim=1), None
        if self.votes is not None:
            votes_BW = self.votes(batch, weights_N, episode)
            z_BW = nn.functional.normalize(z_BW + votes_BW, dim=1)
        novel_BU = self._novel(batch, rows_N, cells_N)
        return Encoding(z_BW, novel_BU, evidence_BE, None if episode is None else votes_BW)

    def _novel(self, batch: FeatureBatch, rows_N: Tensor, cells_N: Tensor) -> Tensor:
        """A random direction per feature, weighted by the square of its rarity; each kind has its share of the length.

        Products are kept but for noise (Johnson and Lindenstrauss 1984), and nothing needs to be known of a word.
        """
        weights_N = self.lexicon.rarities[rows_N].square()
        square_C = torch.bincount(cells_N, weights_N.square(), minlength=batch.num_texts * NUM_KINDS)
        weights_N = weights_N * (self.novel_shares_K[batch.kinds_N] / square_C[cells_N].clamp(min=_SQUARE_FLOOR)).sqrt()
        all_N = torch.ones_like(rows_N, dtype=torch.bool)
        sum_BU = _bag(self.novel_table, batch.slots_N % _NOVEL_ROWS, batch, all_N, weights_N)
        # A word that is said a hundred times would make it ten times as long.
        return nn.functional.normalize(sum_BU, dim=1)


def join(parts: Sequence[Encoding]) -> Encoding:
    """Encodings of several batches as one."""
    return Encoding(
        torch.cat([part.z_BW for part in parts]),
        torch.cat([part.novel_BU for part in parts]),
        torch.cat([part.evidence_BE for part in parts]),
    )


def _bag(table: Tensor, rows_N: Tensor, batch: FeatureBatch, kept_N: Tensor, weights_N: Tensor) -> Tensor:
    """The weighted sum of a table's rows over each text's kept features."""
    sizes_B = torch.bincount(batch.texts_N[kept_N], minlength=batch.num_texts)
    return nn.functional.embedding_bag(
        rows_N[kept_N], table, sizes_B.cumsum(0) - sizes_B, mode="sum", per_sample_weights=weights_N[kept_N]
    )
