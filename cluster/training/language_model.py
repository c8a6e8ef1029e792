"""The language-model loss, in training and in evaluation, wherever the model lies."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.training.data import IGNORED_LABEL, Batch, Example, collate


def batch_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the labelled tokens. The head runs on those positions alone."""
    return nn.functional.cross_entropy(*_logits_and_labels(model, batch))


def _logits_and_labels(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    batch = batch.to(model.device)
    labelled_BT = batch.labels_BT != IGNORED_LABEL
    # On the head's way in, so that whatever the model does to its logits afterwards is done, such as scaling them.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0][labelled_BT],))
    try:
        logits_LV = model(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False).logits
    finally:
        hook.remove()
    return logits_LV.float(), batch.labels_BT[labelled_BT]


@torch.inference_mode()
def summed_loss(model: PreTrainedModel, batch: Batch) -> float:
    """Summed cross-entropy in nats over the labelled tokens."""
    return float(nn.functional.cross_entropy(*_logits_and_labels(model, batch), reduction="sum"))


@torch.inference_mode()
def row_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Summed cross-entropy in nats of each row's labelled tokens, float64 [B], on the CPU."""
    logits, labels = _logits_and_labels(model, batch)
    rows = (batch.labels_BT != IGNORED_LABEL).nonzero()[:, 0]
    nats = nn.functional.cross_entropy(logits, labels, reduction="none").double().cpu()
    return torch.zeros(len(batch.ids_BT), dtype=torch.float64).index_add_(0, rows, nats)


def batches_by_length(examples: Sequence[Example], tokens_per_batch: int, pad_id: int) -> list[Batch]:
    """All examples, shortest first, responses to be predicted: for evaluation."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    groups: list[list[int]] = [[]]
    for index in order:
        if groups[-1] and len(examples[index].ids) * (len(groups[-1]) + 1) > tokens_per_batch:
            groups.append([])
        groups[-1].append(index)
    return [collate([[examples[i]] for i in group], pad_id, learn_prompts=False) for group in groups if group]


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, tokens_per_batch: int = 8192) -> float:
    """Mean loss in nats per response token."""
    batches = batches_by_length(examples, tokens_per_batch, pad_id)
    return sum(summed_loss(model, batch) for batch in batches) / max(1, sum(batch.num_labels for batch in batches))
