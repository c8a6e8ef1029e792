"""A pretrained sentence encoder as teacher: tiny ada learns to place the training texts as the teacher does.

What n-grams find that training texts have in common is their words; what sentences mean alike is what the teacher adds,
so that texts of other words find their domain more often. Nothing of it is needed to route. Regression onto a teacher's
vectors is after Reimers and Gurevych 2020 (arXiv 2004.09813). Letters: B texts, W width of a text's vector, S width of
the teacher's.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cluster.router.features import FeatureBatch, TextFeatures

_WEIGHT = 10.0
"""Of 3 and 10 the better on a part of CLINC150's train split (docs/experiments.md)."""


class Teaching(nn.Module):
    """The way from tiny ada's vectors to the teacher's, learned beside the encoder and left behind with training."""

    def __init__(self, texts: Sequence[TextFeatures], width: int) -> None:
        """`texts`, all of those that are learned from, come with the teacher's vectors."""
        super().__init__()
        vectors = [text.sentence_S for text in texts if text.sentence_S is not None]
        assert len(vectors) == len(texts), "every text was read by the teacher"
        # Less their mean, which says what all texts have in common.
        self.register_buffer("mean_S", torch.from_numpy(np.mean(vectors, axis=0)))
        self.projection = nn.Linear(width, len(vectors[0]), bias=False)
        nn.init.orthogonal_(self.projection.weight)

    mean_S: Tensor

    def loss(self, z_BW: Tensor, batch: FeatureBatch, counted_B: Tensor) -> Tensor:
        """One less the cosine, on the mean of the texts in `counted_B` (bool), times its weight; 0 without any."""
        assert batch.sentences_BS is not None, "the batch was read by the teacher"
        cosine_B = nn.functional.cosine_similarity(self.projection(z_BW), batch.sentences_BS - self.mean_S, dim=1)
        return _WEIGHT * ((1 - cosine_B) * counted_B).sum() / counted_B.sum().clamp(min=1)
