"""Stage 2: one adapter per domain, all over the same frozen base and in one pass, published in one generation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cluster.config import StageSettings
from cluster.lora import peft_format
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.lora.weights import AdapterWeights
from cluster.model.base import Base
from cluster.training.artifacts import publish_for_base, published_base
from cluster.training.data import DataSet, encode, stage_data
from cluster.training.one_pass import FitSettings, Fitted, fit_adapters, mean_losses
from cluster.training.provenance import provenance
from cluster.training.run import Run


def train_adapters(settings: StageSettings, run: Run) -> None:
    """Train an adapter for every domain of the data and publish them together."""
    recipe, options = settings.recipe, settings.recipe.adapters
    catalog = Catalog(settings.root)
    state = catalog.load()
    base = published_base(settings.root, state)
    data = stage_data(settings, run)
    examples = {
        domain: encode(base.tokenizer, data.rows("train", domain, recipe.train_rows_per_domain), options.max_tokens)
        for domain in data.domains
    }
    how = FitSettings(options, recipe.seed, recipe.checkpoint_every_steps, f"2/4 {len(examples)} adapters")
    fitted = fit_adapters(base, examples, how, run)
    made = provenance("adapters", settings)
    published = {
        domain: publish_adapter(settings.root, domain, one.weights, base.name, made) for domain, one in fitted.items()
    }
    publish_for_base(catalog, Change(adapters=published), state.base)
    _report(base, fitted, data, settings, run)


def publish_adapter(root: Path, domain: str, weights: AdapterWeights, base_name: str, made: Mapping[str, Any]) -> int:
    """Write one adapter as the domain's next version and return its number. Not current until the catalog says so.

    `made` says what it was made of.
    """
    weights.check_finite()
    return write_version(
        root / "adapters" / domain, lambda folder: peft_format.save(folder, weights, f"base/{base_name}", dict(made))
    )


def _report(base: Base, fitted: Mapping[str, Fitted], data: DataSet, settings: StageSettings, run: Run) -> None:
    limit, max_tokens = settings.recipe.val_rows_per_domain, settings.recipe.adapters.max_tokens
    examples = {domain: encode(base.tokenizer, data.rows("val", domain, limit), max_tokens) for domain in fitted}
    before = mean_losses(base, {}, examples)
    after = mean_losses(base, {domain: one.weights for domain, one in fitted.items()}, examples)
    lines = [f"{domain} {before[domain]:.2f} -> {after[domain]:.2f}" for domain in before]
    run.say(f"published {len(fitted)} adapters; validation loss, base -> adapter: {', '.join(lines)}")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills rows up: nothing reads it, so a base without a padding token may use any other."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
