"""Kinds of text within a domain, where the training data names them: one prototype each, told apart in training.

Domains are learned better for it: what tells two kinds of one domain apart tells each of them from other domains too.
Knows nothing of text or features. Letters: N texts, B texts of a batch, D domains, P prototypes, W width, F = D * P.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cluster.errors import InvalidData
from cluster.router.episodes import Episode
from cluster.router.head import SHARPNESS


class Topics:
    """Which prototype of its domain each training text belongs to."""

    def __init__(self, labels_N: Tensor, topics: Sequence[str] | None, num_domains: int, num_unnamed: int) -> None:
        """`labels_N` numbers the texts' domains, `num_domains` for none. Without `topics`, and in a domain that names a
        single one, `num_unnamed` prototypes share the texts as they find best.

        Raises `InvalidData` when there is not one topic for each text.
        """
        if topics is not None and len(topics) != len(labels_N):
            raise InvalidData(f"There are {len(labels_N)} texts and {len(topics)} topics; give a topic for each text.")
        self.num_rows_D = torch.full((num_domains,), num_unnamed)
        """Prototypes of each domain."""
        self._row_N = torch.full((len(labels_N),), -1)
        for domain in range(num_domains if topics is not None else 0):
            self._name_rows(domain, (labels_N == domain).nonzero().flatten().tolist(), topics or ())
        self.are_known = bool((self._row_N >= 0).any())
        """Whether `loss` has anything to teach."""
        self.most_rows = int(self.num_rows_D.max())

    def _name_rows(self, domain: int, texts: Sequence[int], topics: Sequence[str]) -> None:
        names = sorted({topics[text] for text in texts})
        if len(names) > 1:
            numbers = {name: number for number, name in enumerate(names)}
            self.num_rows_D[domain] = len(names)
            self._row_N[texts] = torch.tensor([numbers[topics[text]] for text in texts])

    def loss(self, z_BW: Tensor, prototypes_DPW: Tensor, none_B1: Tensor, episode: Episode, drawn_B: Tensor) -> Tensor:
        """Cross entropy over all prototypes and none, in nats; of texts whose topic is unknown nothing counts."""
        num_domains, most_rows, _ = prototypes_DPW.shape
        logits_BF = SHARPNESS * z_BW @ prototypes_DPW.flatten(0, 1).T
        padding_DP = torch.arange(most_rows) >= self.num_rows_D[:, None]
        missing_F = (padding_DP | episode.hidden_D[:, None]).flatten()
        logits_BC = torch.cat((logits_BF.masked_fill(missing_F, -math.inf), none_B1), dim=1)
        row_B = self._row_N[drawn_B]
        target_B = torch.where(row_B >= 0, episode.labels_B * most_rows + row_B, -1)
        target_B = torch.where(episode.labels_B == num_domains, num_domains * most_rows, target_B)
        return nn.functional.cross_entropy(logits_BC, target_B, ignore_index=-1)
