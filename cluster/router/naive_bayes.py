"""What counting alone says of a text's domain: complement naive Bayes over every feature that training saw.

Rows of a table are learned, which takes many steps for each and learns by heart what few texts hold. Counts need no
steps, so that features without a row of their own speak too. In training a text is left out of the counts that judge
it: without that, they would know its domain already. After Rennie, Shih, Teevan and Karger 2003 ("Tackling the poor
assumptions of naive Bayes text classifiers"). Letters: F features, M pairs of a feature and a domain that holds it, B
texts, D domains that were trained, W width of a text's vector, N features of a batch, E pairs of a batch.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cluster.router.episodes import Episode
from cluster.router.features import NUM_SLOTS, FeatureBatch, TextFeatures

_LEAST_SHARE = 1 / 32
"""Of the texts that hold a feature: what a domain with fewer of them gets is next to nothing."""

_INITIAL_STD = 0.05


class NaiveBayes(nn.Module):
    """Counts, never trained, and the layers that make the domains' votes a vector."""

    slots_F: Tensor
    num_texts_F: Tensor
    starts: Tensor
    domains_M: Tensor
    counts_M: Tensor
    numbers: Tensor
    weights_M: Tensor

    def __init__(
        self,
        slots_F: Tensor,
        num_texts_F: Tensor,
        starts: Tensor,
        domains_M: Tensor,
        counts_M: Tensor,
        domains_DW: Tensor,
    ) -> None:
        """int32 but for the last. `starts` [F + 1]: where each feature's pairs begin; `counts_M`: texts of each pair.

        `domains_DW`: where each domain's votes point to at first. Raises `ValueError` for numbers that point nowhere.
        """
        super().__init__()
        _check(slots_F, NUM_SLOTS)
        _check(domains_M, len(domains_DW))
        sizes_F = starts.long().diff()
        ends = (len(sizes_F), int(starts[0]), int(starts[-1]))
        if ends != (len(slots_F), 0, len(domains_M)) or bool((sizes_F < 0).any()):
            raise ValueError("the features' counts do not lie one after the other")
        num_texts_M = num_texts_F.repeat_interleave(sizes_F)
        if bool((counts_M < 1).any() or (counts_M > num_texts_M).any()):
            raise ValueError("a domain has no text of a feature that it holds, or more than there are")
        self.register_buffer("slots_F", slots_F)
        self.register_buffer("num_texts_F", num_texts_F)
        self.register_buffer("starts", starts)
        self.register_buffer("domains_M", domains_M)
        self.register_buffer("counts_M", counts_M)
        numbers = torch.full((NUM_SLOTS,), -1, dtype=torch.int32)
        numbers[slots_F.long()] = torch.arange(len(slots_F), dtype=torch.int32)
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("weights_M", _weights(counts_M, num_texts_M), persistent=False)
        width = domains_DW.shape[1]
        self.domains_DW = nn.Parameter(domains_DW)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    @classmethod
    def counted(cls, texts: Sequence[TextFeatures], domains: NDArray[np.int64], num_domains: int, width: int) -> Self:
        """`domains` [texts] holds numbers up to `num_domains`, which is none: its texts count against all domains."""
        present = [np.unique(text.slots_N) for text in texts]
        owners = np.repeat(domains, [len(slots) for slots in present])
        pairs, counts = np.unique(np.concatenate(present) * (num_domains + 1) + owners, return_counts=True)
        slots, owners = pairs // (num_domains + 1), pairs % (num_domains + 1)
        num_texts = np.bincount(slots, counts, minlength=NUM_SLOTS)
        kept = (owners < num_domains) & (counts >= _LEAST_SHARE * num_texts[slots])
        kept_slots, sizes = np.unique(slots[kept], return_counts=True)
        return cls(
            _int32(kept_slots),
            _int32(num_texts[kept_slots]),
            _int32(np.append(0, sizes.cumsum())),
            _int32(owners[kept]),
            _int32(counts[kept]),
            _INITIAL_STD * torch.randn(num_domains, width),
        )

    def forward(self, batch: FeatureBatch, weights_N: Tensor, episode: Episode | None = None) -> Tensor:
        """[B, W], of length below 1, the shorter the less the features say.

        In an episode, of texts that were all counted, each is judged as if it had not been. Features that it hides do
        not vote; what it silences votes, since it is not learned by heart. Hidden domains are voted for: a domain that
        is removed later is too, and its prompts must not look like another's for that.
        """
        numbers_N = self.numbers[batch.slots_N].long()
        voting_N = numbers_N >= 0 if episode is None else (numbers_N >= 0) & ~episode.hidden_N
        features = (numbers_N[voting_N], batch.texts_N[voting_N], weights_N[voting_N])
        votes_BD = self._votes(*features, batch.num_texts, None if episode is None else episode.own_B)
        sum_BW = votes_BD @ self.domains_DW
        sum_BW = sum_BW + self.down(nn.functional.gelu(self.up(sum_BW)))
        # Of length 1 it would be as loud for a stranger of two known words as for a prompt that is known whole.
        length_B1 = torch.linalg.vector_norm(sum_BW, dim=1, keepdim=True)
        short_BW: Tensor = sum_BW / (1 + length_B1)
        return short_BW

    def _votes(
        self, numbers_N: Tensor, texts_N: Tensor, weights_N: Tensor, num_texts: int, own_B: Tensor | None
    ) -> Tensor:
        sizes_N = self.starts[numbers_N + 1] - self.starts[numbers_N]
        owner_E = torch.arange(len(numbers_N)).repeat_interleave(sizes_N)
        # The pairs of a feature lie one after the other.
        first_N = self.starts[numbers_N] - (sizes_N.cumsum(0) - sizes_N)
        pair_E = torch.arange(len(owner_E)) + first_N[owner_E]
        text_E, domain_E = texts_N[owner_E], self.domains_M[pair_E].long()
        if own_B is None:
            weight_E = self.weights_M[pair_E]
        else:
            is_own_E = domain_E == own_B[text_E]
            weight_E = _weights(self.counts_M[pair_E] - is_own_E.int(), self.num_texts_F[numbers_N][owner_E] - 1)
        num_domains = len(self.domains_DW)
        votes = self.domains_DW.new_zeros(num_texts * num_domains)
        votes.index_add_(0, text_E * num_domains + domain_E, weight_E * weights_N[owner_E])
        return votes.view(num_texts, num_domains)


def _weights(counts: Tensor, num_texts: Tensor) -> Tensor:
    """How much less a feature is expected of the other domains than of all texts, in nats; 0 without counts."""
    return torch.log1p(num_texts.float()) - torch.log1p((num_texts - counts).float())


def _check(numbers: Tensor, bound: int) -> None:
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < bound:
        raise ValueError(f"a number of naive Bayes is {int(numbers.max())}, expected from 0 to below {bound}")


def _int32(array: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array.astype(np.int32))
