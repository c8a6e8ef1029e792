"""Stage 1: a tokenizer and a base, trained from scratch and published as `base/<version>`; or one taken over.

A new base withdraws the adapters and the router of the one before, since they mean nothing on any other.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cluster.config.training import BaseSettings, StageSettings
from cluster.errors import InvalidData, InvalidInput
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.messages import BASE_DOMAIN, NONE_DOMAIN
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM
from cluster.model.base import fingerprint
from cluster.model.configuration_zephyra import SIZES
from cluster.model.tokenizer import train_tokenizer
from cluster.training.compute import DTYPES, with_dtype
from cluster.training.corpus import StoredExamples, encode_corpus
from cluster.training.data import BatchPlan, DataSet, Example, Row, encode, stage_data
from cluster.training.documents import documents
from cluster.training.given_base import take_over_base
from cluster.training.language_model import batches_by_length, summed_loss
from cluster.training.optimization import Optimizer, Training, load_checkpoint, save_checkpoint
from cluster.training.passes import Pass, arrange, num_passes, token_losses
from cluster.training.provenance import write_provenance
from cluster.training.run import Run
from cluster.training.sharding import shard, whole_model
from cluster.training.workers import Workers, balanced

_TOKENIZER_CHARACTERS = 20_000_000
"""The tokenizer's merges are counted on at most so much text, taken evenly from the domains."""

_HELD_OUT_ROWS = 10_000
"""At most so many validation rows are measured."""


def train_base(settings: StageSettings, run: Run) -> None:
    """Train the base of the recipe on the data's train split and publish it, or take over the one that is named."""
    if settings.base is not None:
        if run.workers.is_first:
            take_over_base(settings.root, settings.base, run.say)
        return
    settings = with_dtype(settings, run)
    recipe, base = settings.recipe, settings.recipe.base
    if base.size not in SIZES:
        raise InvalidInput(f"There is no size {base.size!r} of Zephyra Fusion; the sizes are: {', '.join(SIZES)}.")
    data = stage_data(settings, run)
    if next(_rows(data, "train", settings), None) is None:
        raise InvalidData(f"{settings.data} holds no train rows of 'none' or 'base' for this recipe's base to learn.")
    torch.manual_seed(recipe.seed)
    config = ZephyraFusionConfig(**SIZES[base.size])
    # The base may not know the domains, but its alphabet must fit their words too.
    tokenizer = train_tokenizer(_texts(data, settings), config.vocab_size, config.max_position_embeddings)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model: PreTrainedModel = ZephyraFusionForCausalLM(config)
    if run.workers.is_first:
        run.say(f"Zephyra Fusion '{base.size}': {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")
    settings.root.mkdir(parents=True, exist_ok=True)
    say = run.say if run.workers.is_first else None
    held_out = encode(tokenizer, _held_out(data, settings, say), base.max_tokens)
    # Without a name: nothing is left of it where this process is killed.
    with tempfile.TemporaryFile(dir=settings.root) as file:
        corpus = encode_corpus(tokenizer, _rows(data, "train", settings, say), base.max_tokens)
        examples = StoredExamples(file, corpus)
        fit_base(model, examples, base, recipe.seed, recipe.checkpoint_every_steps, run, DTYPES[recipe.dtype])
    if run.workers.shards_base:
        model = whole_model(model, ZephyraFusionForCausalLM(config))
    if not run.workers.is_first:
        return
    model.eval()
    version = write_version(settings.root / "base", lambda folder: _save(model, tokenizer, folder, settings))
    catalog = Catalog(settings.root)
    catalog.publish(Change(base=version))
    bits = _bits_per_byte(model, tokenizer, held_out)
    mark = fingerprint(settings.root / "base" / str(version))
    run.say(f"published base {version} ({mark}): validation {bits:.3f} bits per byte of the answers")


def _rows(
    data: DataSet, split: str, settings: StageSettings, say: Callable[[str], None] | None = None
) -> Iterator[Row]:
    yield from data.rows(split, NONE_DOMAIN)
    yield from data.base_rows(split, say)
    if not settings.recipe.base.general_only:
        limit = settings.recipe.train_rows_per_domain if split == "train" else settings.recipe.val_rows_per_domain
        for domain in data.domains:
            yield from data.rows(split, domain, limit)


def _held_out(data: DataSet, settings: StageSettings, say: Callable[[str], None] | None) -> list[Row]:
    """What bits per byte are measured on; of texts for the base, of which there may be any number, the first."""
    rows = _rows(data, "val", settings, say)
    return list(itertools.islice(rows, _HELD_OUT_ROWS))


def _texts(data: DataSet, settings: StageSettings) -> list[str]:
    limit = settings.recipe.train_rows_per_domain
    parts: list[Iterable[Row]] = [data.rows("train", name, limit) for name in (NONE_DOMAIN, *data.domains)]
    parts.insert(1, itertools.islice(data.base_rows("train"), limit))
    share = _TOKENIZER_CHARACTERS // len(parts)
    texts: list[str] = []
    for part in parts:
        left = share
        for row in part:
            texts += [row.prompt, row.response]
            left -= len(row.prompt) + len(row.response)
            if left < 0:
                break
    return texts


def fit_base(
    model: PreTrainedModel,
    examples: Sequence[Example],
    settings: BaseSettings,
    seed: int,
    every: int,
    run: Run,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Train all weights of `model`, float32, on prompts and responses; a checkpoint after `every` so many steps.

    It moves to the worker's device, and its layers multiply `dtype` meanwhile. Several workers divide each batch, and
    each ends with the same weights: those that one worker gives, but for rounding. Raises `InvalidInput` where the loss
    stays no finite number.
    """
    workers = run.workers
    plan = BatchPlan(examples, settings.tokens_per_batch, pad_id=0, learn_prompts=True, seed=seed)
    nn.Module.to(model, workers.device)
    if workers.shards_base:
        shard(model, dtype)
    else:
        nn.Module.to(model, dtype)
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(parameters, settings.learning_rate, settings.num_steps, settings.weight_decay)
    training = Training("base", optimizer)
    if (checkpoint := run.restore()) is not None:
        done, tensors = load_checkpoint(checkpoint)
        training.load_tensors(tensors)
        if workers.is_first:
            run.say(f"resuming the base at step {done}")
    model.train()
    run.start("1/4 base", settings.num_steps)
    loss, tokens, since = math.nan, 0, time.perf_counter()
    with documents(model) as takes_lengths:
        while training.num_steps < settings.num_steps:
            rows = [example for row in plan.rows(training.num_steps) for example in row]
            value = _backward(model, optimizer, rows, settings.tokens_per_pass, workers, takes_lengths)
            if (went_back := training.step(value)) is not None:
                if workers.is_first:
                    run.say(went_back)
                continue
            tokens += sum(len(row.ids) - 1 for row in rows)
            loss = value if math.isnan(loss) else 0.95 * loss + 0.05 * value
            if workers.is_first:
                run.report(training.num_steps, {"loss": loss, "tokens/s": tokens / (time.perf_counter() - since)})
            if training.num_steps % every == 0:
                training.keep()
                # In one piece, and on one worker: any number of them may go on from it.
                kept = training.tensors()
                save = partial(save_checkpoint, step=training.num_steps, rank=workers.rank)
                run.checkpoint(partial(save, tensors=kept if workers.is_first else {}))
    optimizer.widen()


def _backward(
    model: PreTrainedModel,
    optimizer: Optimizer,
    rows: Sequence[Example],
    tokens_per_pass: int,
    workers: Workers,
    takes_lengths: bool,
) -> float:
    """Put the gradients of the mean loss over the tokens of all rows on the weights, and return that loss.

    Each worker reads a part of the rows, in passes; its tokens count as much as those of any other.
    """
    sizes = [len(row.ids) - 1 for row in rows]
    parts = [[rows[place] for place in places] for places in balanced(sizes, workers.count)]
    passes = arrange({BASE_DOMAIN: parts[workers.rank]}, tokens_per_pass, learn_prompts=True)
    # Layers in pieces are put together by all: who has fewer passes than others reads on, and it counts for nothing.
    # So does who has none, since gradients are summed over all.
    least = max(num_passes(part, tokens_per_pass) for part in parts) if workers.shards_base else 1
    total = torch.zeros((), device=workers.device)
    for number in range(max(len(passes), least)):
        batch, share = (passes[number], 1 / sum(sizes)) if number < len(passes) else (_idle(rows), 0.0)
        loss = token_losses(model, batch.to(workers.device), takes_lengths).sum() * share
        total += loss.detach()
        # FSDP takes the mean over the workers where the sum is wanted.
        (loss * workers.count if workers.shards_base else loss).backward()
        optimizer.gather()
    workers.sum([total, *([] if workers.shards_base else optimizer.gradients())])
    return float(total)


def _idle(rows: Sequence[Example]) -> Pass:
    (batch,) = arrange({BASE_DOMAIN: rows[:1]}, len(rows[0].ids), learn_prompts=True)
    return batch


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, settings: StageSettings) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_provenance(folder, "base", settings)


def _bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> float:
    if not examples:
        return math.nan
    nats = sum(summed_loss(model, batch) for batch in batches_by_length(examples, 8192, tokenizer.pad_token_id))
    return nats / math.log(2) / max(1, sum(example.num_response_bytes for example in examples))
