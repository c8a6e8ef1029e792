"""N-grams and a pretrained sentence encoder side by side -> one unit vector per text.

The sentence's vector, through a learned projection, is added to that of the n-grams: it knows words that training never
saw, while the n-grams know which words those are, which is the evidence for none. Prompts that teach none because they
lost their words keep their sentence, so that none hangs on that evidence. Knows nothing of domains. Letters: B texts, N
features, S width of a sentence's vector, W width of a text's.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from cluster.router.encoder import Encoder, Encoding
from cluster.router.features import FeatureBatch, TextFeatures, extract
from cluster.router.sentence_model import SentenceModel

_INITIAL_STD = 0.05


class SentenceEncoder(nn.Module):
    """Both, of which the pretrained one is not trained, nor among the parameters."""

    def __init__(self, ngrams: Encoder, sentences: SentenceModel) -> None:
        super().__init__()
        self.ngrams = ngrams
        self.sentences = sentences
        self.projection = nn.Linear(sentences.width, ngrams.width, bias=False)
        nn.init.normal_(self.projection.weight, std=_INITIAL_STD)

    @property
    def width(self) -> int:
        """Numbers of a text's vector."""
        return self.ngrams.width

    def read(self, texts: Sequence[str]) -> list[TextFeatures]:
        """What the encoder reads of each text."""
        return read(texts, self.sentences)

    def forward(self, batch: FeatureBatch, hidden_N: Tensor | None = None, silent_N: Tensor | None = None) -> Encoding:
        """Encode a batch that `read` made, as `Encoder` does."""
        assert batch.sentences_BS is not None, "the features were read without the sentence encoder"
        encoding: Encoding = self.ngrams(batch, hidden_N, silent_N)
        sum_BW = encoding.z_BW + self.projection(batch.sentences_BS)
        return replace(encoding, z_BW=nn.functional.normalize(sum_BW, dim=1))


def read(texts: Sequence[str], sentences: SentenceModel | None) -> list[TextFeatures]:
    """The n-grams of each text, and its sentence's vector where there is a model."""
    features = [extract(text) for text in texts]
    if sentences is None:
        return features
    vectors_BS = sentences.embed(texts).numpy()
    return [replace(one, sentence_S=vector_S) for one, vector_S in zip(features, vectors_BS, strict=True)]
