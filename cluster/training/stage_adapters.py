"""Stage 2: one adapter per domain, all over the same frozen base, published in one generation.

Each step gives every domain one batch of its own rows, so that all domains are learned at the same pace and no
adapter sees another's data.
"""

import math
import time
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cluster.config import StageSettings
from cluster.lora import peft_format
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.lora.weights import AdapterWeights
from cluster.model.base import Base
from cluster.training.artifacts import publish_for_base, published_base
from cluster.training.data import BatchPlan, DataSet, Example, encode, read_data
from cluster.training.language_model import batch_loss, mean_loss
from cluster.training.optimization import Optimizer, load_checkpoint, save_checkpoint
from cluster.training.run import Run
from cluster.training.trainable_lora import TrainableAdapters

_RECENT_STEPS = 8
"""Steps whose mean loss says whether a domain is learned."""


def train_adapters(settings: StageSettings, run: Run) -> None:
    """Train an adapter for every domain of the data and publish them together."""
    recipe, options = settings.recipe, settings.recipe.adapters
    catalog = Catalog(settings.root)
    state = catalog.load()
    base = published_base(settings.root, state)
    data = read_data(settings.data)
    adapters = TrainableAdapters(base.model, data.domains, options.rank, options.alpha, recipe.seed)
    _fit(adapters, base, data, settings, run)
    published = {}
    for domain in data.domains:
        weights = adapters.weights(domain, base.fingerprint)
        published[domain] = publish_adapter(settings.root, domain, weights, base.name, settings)
    publish_for_base(catalog, Change(adapters=published), state.base)
    _report(adapters, base, data, settings, run)


def publish_adapter(root: Path, domain: str, weights: AdapterWeights, base_name: str, settings: StageSettings) -> int:
    """Write one adapter as the domain's next version and return its number. Not current until the catalog says so."""
    weights.check_finite()
    kept = {"recipe": settings.name, "settings": settings.recipe.model_dump(), "seed": settings.recipe.seed}
    return write_version(
        root / "adapters" / domain, lambda folder: peft_format.save(folder, weights, f"base/{base_name}", kept)
    )


def _fit(adapters: TrainableAdapters, base: Base, data: DataSet, settings: StageSettings, run: Run) -> None:
    recipe, options = settings.recipe, settings.recipe.adapters
    pad_id = padding_id(base.tokenizer)
    plans, optimizers = {}, {}
    for domain in data.domains:
        rows = data.rows("train", domain, recipe.train_rows_per_domain)
        examples = encode(base.tokenizer, rows, options.max_tokens)
        plans[domain] = BatchPlan(examples, options.tokens_per_batch, pad_id, learn_prompts=False, seed=recipe.seed)
        optimizers[domain] = Optimizer(adapters.parameters(domain), options.learning_rate, options.num_steps)
    first = 0
    recent = {domain: torch.full((_RECENT_STEPS,), math.inf) for domain in data.domains}
    if (checkpoint := run.restore()) is not None:
        first, tensors = load_checkpoint(checkpoint)
        for domain in data.domains:
            optimizers[domain].load_tensors(tensors, f"{domain}:")
            recent[domain] = tensors[f"{domain}|recent"]
        run.say(f"resuming the adapters at step {first}")
    run.start(f"2/4 {len(data.domains)} adapters", options.num_steps)
    tokens, since = 0, time.perf_counter()
    for step in range(first, options.num_steps):
        for domain in data.domains:
            if float(recent[domain].mean()) < options.learned_loss:
                continue
            adapters.select(domain)
            batch = plans[domain].batch(step)
            loss = batch_loss(base.model, batch)
            loss.backward()
            optimizers[domain].step(step)
            recent[domain][step % _RECENT_STEPS] = loss.detach()
            tokens += batch.ids_BT.numel()
        speed = tokens / (time.perf_counter() - since)
        newest = [float(losses[step % _RECENT_STEPS]) for losses in recent.values()]
        run.report(step + 1, {"loss": sum(newest) / len(newest), "tokens/s": speed})
        if (step + 1) % recipe.checkpoint_every_steps == 0:
            done = step + 1
            state = {f"{domain}|recent": losses.clone() for domain, losses in recent.items()}
            for domain in data.domains:
                state.update(optimizers[domain].tensors(f"{domain}:"))
            run.checkpoint(partial(save_checkpoint, step=done, tensors=state))


def _report(adapters: TrainableAdapters, base: Base, data: DataSet, settings: StageSettings, run: Run) -> None:
    limit = settings.recipe.val_rows_per_domain
    lines = []
    for domain in data.domains:
        examples = encode(base.tokenizer, data.rows("val", domain, limit), settings.recipe.adapters.max_tokens)
        if examples:
            before, after = (_loss(adapters, base, choice, examples) for choice in (None, domain))
            lines.append(f"{domain} {before:.2f} -> {after:.2f}")
    run.say(f"published {len(data.domains)} adapters; validation loss, base -> adapter: {', '.join(lines)}")


def _loss(adapters: TrainableAdapters, base: Base, domain: str | None, examples: list[Example]) -> float:
    adapters.select(domain)
    return mean_loss(base.model, examples, padding_id(base.tokenizer))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills rows up: nothing reads it, so a base without a padding token may use any other."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
