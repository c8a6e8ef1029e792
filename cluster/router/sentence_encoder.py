"""N-grams and a pretrained sentence encoder side by side -> one unit vector per text.

The sentence's vector, through a learned projection, is added to that of the n-grams: it knows words that training never
saw, while the n-grams know which words those are, which is the evidence for none. Prompts that teach none because they
lost their words keep their sentence, so that none hangs on that evidence. The sentence also stands in place of the
sketch of words: as it is, not as training projects it, it tells domains that training never saw. Knows nothing of
domains. Letters: B and N texts, S width of a sentence's vector, W width of a text's, U width of the sketch.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cluster.router.encoder import NOVEL_WIDTH, Encoder, Encoding
from cluster.router.episodes import Episode
from cluster.router.features import FeatureBatch, TextFeatures, extract
from cluster.router.sentence_model import SentenceModel

_INITIAL_STD = 0.05
_LEAST_VARIANCE = 0.1
"""Of the mean over all directions, added to that of each before whitening."""


class SentenceEncoder(nn.Module):
    """Both, of which the pretrained one is not trained, nor among the parameters."""

    def __init__(self, ngrams: Encoder, sentences: SentenceModel) -> None:
        super().__init__()
        self.ngrams = ngrams
        self.sentences = sentences
        self.projection = nn.Linear(sentences.width, ngrams.width, bias=False)
        nn.init.normal_(self.projection.weight, std=_INITIAL_STD)
        self.register_buffer("mean_S", torch.zeros(sentences.width))
        self.register_buffer("directions_SU", torch.zeros(sentences.width, NOVEL_WIDTH))

    mean_S: Tensor
    directions_SU: Tensor

    @property
    def width(self) -> int:
        """Numbers of a text's vector."""
        return self.ngrams.width

    def read(self, texts: Sequence[str]) -> list[TextFeatures]:
        """What the encoder reads of each text."""
        return read(texts, self.sentences)

    def forward(self, batch: FeatureBatch, episode: Episode | None = None) -> Encoding:
        """Encode a batch that `read` made, as `Encoder` does."""
        encoding: Encoding = self.ngrams(batch, episode)
        sum_BW = encoding.z_BW + self._projected(batch)
        sketch_BU = (_sentences(batch) - self.mean_S) @ self.directions_SU
        return replace(
            encoding,
            z_BW=nn.functional.normalize(sum_BW, dim=1),
            novel_BU=nn.functional.normalize(sketch_BU, dim=1),
        )

    @torch.no_grad()
    def orient(self, sentences_NS: Tensor) -> None:
        """Choose what of a sentence's vector is its sketch: the first principal directions of training texts' vectors.

        Whitened, each divided by its standard deviation: what tells known domains apart varies most, and is not what
        will tell a new one. A share of the mean variance is added, since some directions hardly vary.
        """
        self.mean_S.copy_(sentences_NS.mean(0))
        centred_NS = (sentences_NS - self.mean_S).double()
        variances_S, vectors_SS = torch.linalg.eigh(centred_NS.T @ centred_NS / len(centred_NS))
        variances_S = variances_S.clamp(min=0) + _LEAST_VARIANCE * variances_S.mean()
        kept_SU = (vectors_SS * variances_S.rsqrt()).flip(1)[:, :NOVEL_WIDTH]
        # A sentence's vector of fewer numbers leaves the rest of them 0.
        self.directions_SU[:, : kept_SU.shape[1]] = kept_SU.float()

    def without_ngrams(self, batch: FeatureBatch, encoding: Encoding) -> Encoding:
        """`encoding`, which is the batch's, with the vector that the sentences alone give."""
        return replace(encoding, z_BW=nn.functional.normalize(self._projected(batch), dim=1))

    def _projected(self, batch: FeatureBatch) -> Tensor:
        projected_BW: Tensor = self.projection(_sentences(batch))
        return projected_BW


def _sentences(batch: FeatureBatch) -> Tensor:
    assert batch.sentences_BS is not None, "the features were read without the sentence encoder"
    return batch.sentences_BS


def read(texts: Sequence[str], sentences: SentenceModel | None) -> list[TextFeatures]:
    """The n-grams of each text, and its sentence's vector where there is a model."""
    features = [extract(text) for text in texts]
    if sentences is None:
        return features
    vectors_BS = sentences.embed(texts).numpy()
    return [replace(one, sentence_S=vector_S) for one, vector_S in zip(features, vectors_BS, strict=True)]
