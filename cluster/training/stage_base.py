"""Stage 1: a tokenizer and a base, trained from scratch and published as `base/<version>`; or one taken over.

A new base withdraws the adapters and the router of the one before, since they mean nothing on any other.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluster.config import BaseSettings, StageSettings
from cluster.errors import InvalidData, InvalidInput
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.messages import NONE_DOMAIN
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM
from cluster.model.base import fingerprint
from cluster.model.configuration_zephyra import SIZES
from cluster.model.tokenizer import train_tokenizer
from cluster.training.data import BASE_DOMAIN, BatchPlan, DataSet, Example, Row, encode, stage_data
from cluster.training.documents import documents
from cluster.training.given_base import take_over_base
from cluster.training.language_model import batches_by_length, summed_loss
from cluster.training.optimization import Optimizer, load_checkpoint, save_checkpoint
from cluster.training.passes import arrange, token_losses
from cluster.training.provenance import write_provenance
from cluster.training.run import Run

_TOKENIZER_CHARACTERS = 20_000_000
"""The tokenizer's merges are counted on at most so much text, taken evenly from the domains."""


def train_base(settings: StageSettings, run: Run) -> None:
    """Train the base of the recipe on the data's train split and publish it, or take over the one that is named."""
    if settings.base is not None:
        take_over_base(settings.root, settings.base, run.say)
        return
    recipe, base = settings.recipe, settings.recipe.base
    if base.size not in SIZES:
        raise InvalidInput(f"There is no size {base.size!r} of Zephyra Fusion; the sizes are: {', '.join(SIZES)}.")
    data = stage_data(settings, run)
    rows = _rows(data, "train", settings)
    if not rows:
        raise InvalidData(f"{settings.data} holds no train rows of 'none' or 'base' for this recipe's base to learn.")
    torch.manual_seed(recipe.seed)
    config = ZephyraFusionConfig(**SIZES[base.size])
    # The base may not know the domains, but its alphabet must fit their words too.
    tokenizer = train_tokenizer(_texts(data, settings), config.vocab_size, config.max_position_embeddings)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model: PreTrainedModel = ZephyraFusionForCausalLM(config)
    run.say(f"Zephyra Fusion '{base.size}': {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")
    fit_base(model, encode(tokenizer, rows, base.max_tokens), base, recipe.seed, recipe.checkpoint_every_steps, run)
    model.eval()
    version = write_version(settings.root / "base", lambda folder: _save(model, tokenizer, folder, settings))
    catalog = Catalog(settings.root)
    catalog.publish(Change(base=version))
    bits = _bits_per_byte(model, tokenizer, _rows(data, "val", settings), base.max_tokens)
    mark = fingerprint(settings.root / "base" / str(version))
    run.say(f"published base {version} ({mark}): validation {bits:.3f} bits per byte of the answers")


def _rows(data: DataSet, split: str, settings: StageSettings) -> list[Row]:
    general = [row for name in (NONE_DOMAIN, BASE_DOMAIN) for row in data.rows(split, name)]
    if settings.recipe.base.general_only:
        return general
    limit = settings.recipe.train_rows_per_domain if split == "train" else settings.recipe.val_rows_per_domain
    return general + [row for domain in data.domains for row in data.rows(split, domain, limit)]


def _texts(data: DataSet, settings: StageSettings) -> list[str]:
    names = (NONE_DOMAIN, BASE_DOMAIN, *data.domains)
    share = _TOKENIZER_CHARACTERS // len(names)
    texts: list[str] = []
    for name in names:
        left = share
        for row in data.rows("train", name, settings.recipe.train_rows_per_domain):
            texts += [row.prompt, row.response]
            left -= len(row.prompt) + len(row.response)
            if left < 0:
                break
    return texts


def fit_base(
    model: PreTrainedModel, examples: Sequence[Example], settings: BaseSettings, seed: int, every: int, run: Run
) -> None:
    """Train all weights of `model` on prompts and responses; a checkpoint after `every` so many steps."""
    plan = BatchPlan(examples, settings.tokens_per_batch, pad_id=0, learn_prompts=True, seed=seed)
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(parameters, settings.learning_rate, settings.num_steps, settings.weight_decay)
    first = 0
    if (checkpoint := run.restore()) is not None:
        first, tensors = load_checkpoint(checkpoint)
        optimizer.load_tensors(tensors)
        run.say(f"resuming the base at step {first}")
    model.train()
    run.start("1/4 base", settings.num_steps)
    loss, tokens, since = math.nan, 0, time.perf_counter()
    with documents(model) as takes_lengths:
        for step in range(first, settings.num_steps):
            rows = [example for row in plan.rows(step) for example in row]
            (batch,) = arrange({BASE_DOMAIN: rows}, sum(len(row.ids) for row in rows), learn_prompts=True)
            value = token_losses(model, batch, takes_lengths).mean()
            value.backward()
            optimizer.step(step)
            tokens += len(batch.ids_T)
            loss = float(value.detach()) if math.isnan(loss) else 0.95 * loss + 0.05 * float(value.detach())
            run.report(step + 1, {"loss": loss, "tokens/s": tokens / (time.perf_counter() - since)})
            if (step + 1) % every == 0:
                run.checkpoint(partial(save_checkpoint, step=step + 1, tensors=optimizer.tensors()))


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, settings: StageSettings) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_provenance(folder, "base", settings)


def _bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], limit: int) -> float:
    examples = encode(tokenizer, rows, limit)
    if not examples:
        return math.nan
    nats = sum(summed_loss(model, batch) for batch in batches_by_length(examples, 8192, tokenizer.pad_token_id))
    return nats / math.log(2) / max(1, sum(example.num_response_bytes for example in examples))
