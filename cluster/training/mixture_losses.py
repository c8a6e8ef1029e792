"""What a base loses on rows of data, each through a mixture of its own: through the mixed batch that serves."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cluster.lora.linear import attach_mixed_batch
from cluster.lora.weights import AdapterWeights
from cluster.messages import AdapterRef, Mixture
from cluster.model.base import Base
from cluster.training.data import Row, collate, encode
from cluster.training.language_model import row_losses
from cluster.training.stage_adapters import padding_id

_ROWS_PER_BATCH = 8


class MixtureLosses:
    """Measures with a copy of the base's model; what it mixes is put into `adapters` first."""

    def __init__(self, base: Base, max_tokens: int) -> None:
        """Rows longer than `max_tokens` are cut as in training."""
        self.model = copy.deepcopy(base.model)
        self._tokenizer = base.tokenizer
        self._max_tokens = max_tokens
        self._mixed_batch = attach_mixed_batch(self.model)
        self.adapters: dict[AdapterRef, AdapterWeights] = {}

    @torch.inference_mode()
    def of_rows(self, rows: Sequence[Row], mixtures: Sequence[Mixture]) -> tuple[Tensor, Tensor]:
        """Nats of each row's right answer, float64 [N], and its tokens, int64 [N]."""
        examples = encode(self._tokenizer, rows, self._max_tokens)
        nats_N = torch.zeros(len(rows), dtype=torch.float64)
        tokens_N = torch.zeros(len(rows), dtype=torch.long)
        order = sorted(range(len(rows)), key=lambda i: len(examples[i].ids))
        for start in range(0, len(order), _ROWS_PER_BATCH):
            chosen = order[start : start + _ROWS_PER_BATCH]
            batch = collate([[examples[i]] for i in chosen], padding_id(self._tokenizer), learn_prompts=False)
            lengths = [batch.ids_BT.shape[1]] * len(chosen)
            self._mixed_batch.set_rows([mixtures[i] for i in chosen], lengths, self.adapters)
            nats_N[chosen] = row_losses(self.model, batch)
            tokens_N[chosen] = torch.tensor([len(examples[i].ids) - examples[i].num_prompt_tokens for i in chosen])
        return nats_N, tokens_N

    def mean(self, rows: Sequence[Row], mixtures: Sequence[Mixture]) -> float:
        """Nats per token of the right answers, NaN of no rows."""
        nats_N, tokens_N = self.of_rows(rows, mixtures)
        return float(nats_N.sum()) / int(tokens_N.sum()) if len(rows) else math.nan


def mixture_of(weights: Mapping[str, float], refs: Mapping[str, AdapterRef]) -> Mixture:
    """What a decision's weights by domain mean: names of the same adapter add up, those without one are left out."""
    summed: dict[AdapterRef, float] = {}
    for name, weight in weights.items():
        if (ref := refs.get(name)) is not None:
            summed[ref] = summed.get(ref, 0.0) + weight
    return Mixture.of(summed)
