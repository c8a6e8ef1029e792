"""The loss of packed rows, and of rows in batches, against that of single rows written out."""

from typing import Any

import pytest
import torch

from cluster.training.data import collate
from cluster.training.language_model import batch_loss, mean_loss, summed_loss
from tests.model.nano import nano_model
from tests.training.rows import nano_tokenizer, some_examples

TOKENIZER = nano_tokenizer()
PAD = TOKENIZER.pad_token_id
EXAMPLES = some_examples(TOKENIZER, 7)


def _single_losses(model: Any, learn_prompts: bool) -> list[float]:
    """Summed loss of each example by itself, written out."""
    losses = []
    for example in EXAMPLES:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            log_probabilities = model(input_ids=ids).logits[0].double().log_softmax(-1)
        first = 1 if learn_prompts else example.num_prompt_tokens
        losses.append(-sum(float(log_probabilities[t - 1, example.ids[t]]) for t in range(first, len(example.ids))))
    return losses


@pytest.mark.parametrize("learn_prompts", [False, True])
def test_packed_rows_lose_what_their_examples_lose_alone(learn_prompts: bool) -> None:
    model = nano_model(vocab_size=len(TOKENIZER))
    packed = collate([EXAMPLES[:3], EXAMPLES[3:4], EXAMPLES[4:]], PAD, learn_prompts)
    losses = _single_losses(model, learn_prompts)
    assert summed_loss(model, packed) == pytest.approx(sum(losses), rel=1e-4)
    assert float(batch_loss(model, packed).detach()) == pytest.approx(sum(losses) / packed.num_labels, rel=1e-4)


def test_mean_loss_is_the_same_however_it_is_batched() -> None:
    model = nano_model(vocab_size=len(TOKENIZER))
    num_labels = sum(len(example.ids) - example.num_prompt_tokens for example in EXAMPLES)
    expected = sum(_single_losses(model, learn_prompts=False)) / num_labels
    for tokens_per_batch in (1, 100, 8192):
        assert mean_loss(model, EXAMPLES, PAD, tokens_per_batch) == pytest.approx(expected, rel=1e-4)
