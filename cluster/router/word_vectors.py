"""What a pretrained sentence encoder says of single words, kept as a table: words that training never saw have a place.

Made once, when the router is trained; to route, a word is looked up, which takes no time beside what the encoder itself
would. After Model2Vec (Tulkens and van Dongen 2024), which makes whole encoders of such tables; here they stand beside
n-grams that are trained. Letters: Y words, Q width of a word's vector, H width between, B texts, N features, W width of
a text's vector, S width of a sentence's.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from cluster.router.features import NUM_SLOTS, TOKEN, WORD, FeatureBatch, extract, normalise
from cluster.router.sentence_model import SentenceModel

WORD_WIDTH = 64
_HIDDEN_WIDTH = 256
GAIN = 4.0
"""A text's sum of unit vectors over the root of their number has numbers far below 1: next to nothing for a GELU."""

_WRITTEN = re.compile(r"[^\W\d_]+")


class WordVectors(nn.Module):
    """Directions of words, never trained, and the layers that make them part of a text's vector."""

    slots_Y: Tensor
    vectors_YQ: Tensor
    numbers: Tensor

    def __init__(self, slots_Y: Tensor, vectors_YQ: Tensor, width: int) -> None:
        """`slots_Y` int32: where the words are hashed to; `vectors_YQ`: a row for each; `width`: of a text's vector."""
        super().__init__()
        self.register_buffer("slots_Y", slots_Y)
        # In half precision: four digits are more than a direction needs, and the table is most of the router.
        self.register_buffer("vectors_YQ", vectors_YQ.half())
        numbers = torch.full((NUM_SLOTS,), -1, dtype=torch.int32)
        numbers[slots_Y.long()] = torch.arange(len(slots_Y), dtype=torch.int32)
        self.register_buffer("numbers", numbers, persistent=False)
        self.up = nn.Linear(vectors_YQ.shape[1], _HIDDEN_WIDTH)
        self.down = nn.Linear(_HIDDEN_WIDTH, width)

    @classmethod
    def taken_from(cls, model: SentenceModel, texts: Iterable[str], most_words: int, width: int) -> Self:
        """The words of `texts`, most frequent first, then those of the model's own vocabulary: at most `most_words`."""
        words = [word for word, _ in _counted(texts)]
        words = list(dict.fromkeys((*words, *filter(_WRITTEN.fullmatch, model.words()))))[:most_words]
        sentences_YS = model.embed(words)
        centred_YS = sentences_YS - sentences_YS.mean(0)
        # Principal directions: what of the model's vectors tells these words apart.
        _, vectors_SS = torch.linalg.eigh(centred_YS.T.double() @ centred_YS.double())
        turned_YQ = centred_YS @ vectors_SS.flip(1)[:, :WORD_WIDTH].float()
        slots_Y = torch.tensor([int(extract(word).slots_N[0]) for word in words], dtype=torch.int32)
        return cls(slots_Y, nn.functional.normalize(turned_YQ, dim=1), width)

    @property
    def num_parameters(self) -> int:
        """The table's numbers and the layers'."""
        return self.vectors_YQ.numel() + sum(parameter.numel() for parameter in self.parameters())

    def forward(self, batch: FeatureBatch, weights_N: Tensor) -> Tensor:
        """[B, W]: what the words of each text, as many as are in the table, add to its vector."""
        numbers_N = torch.where(batch.kinds_N == WORD, self.numbers[batch.slots_N].long(), -1)
        kept_N = numbers_N >= 0
        vectors = self.vectors_YQ[numbers_N[kept_N]].float() * weights_N[kept_N, None]
        sums_BQ = vectors.new_zeros(batch.num_texts, vectors.shape[1]).index_add_(0, batch.texts_N[kept_N], vectors)
        added_BW: Tensor = self.down(nn.functional.gelu(self.up(GAIN * sums_BQ)))
        return added_BW


def _counted(texts: Iterable[str]) -> Sequence[tuple[str, int]]:
    counts: dict[str, int] = {}
    for text in texts:
        for word in TOKEN.findall(normalise(text)):
            if _WRITTEN.fullmatch(word):
                counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])
