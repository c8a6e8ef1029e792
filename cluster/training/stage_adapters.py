"""Stage 2: one adapter per domain, all over the same frozen base and in one pass, published in one generation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from cluster.config.training import StageSettings
from cluster.lora import peft_format
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.lora.weights import AdapterWeights
from cluster.model.base import Base
from cluster.training.artifacts import publish_for_base, training_base
from cluster.training.compute import with_dtype
from cluster.training.data import DataSet, Example, encode, stage_data
from cluster.training.one_pass import FitSettings, Fitted, fit_adapters, mean_losses
from cluster.training.provenance import provenance
from cluster.training.run import Run

T = TypeVar("T")


def train_adapters(settings: StageSettings, run: Run) -> None:
    """Train an adapter for every domain of the data and publish them together."""
    settings = with_dtype(settings, run)
    recipe, options = settings.recipe, settings.recipe.adapters
    catalog = Catalog(settings.root)
    state = catalog.load()
    base = training_base(settings, run, state)
    data = stage_data(settings, run)
    examples = {
        domain: encode(base.tokenizer, data.rows("train", domain, recipe.train_rows_per_domain), options.max_tokens)
        for domain in data.domains
    }
    how = FitSettings(options, recipe.seed, recipe.checkpoint_every_steps, f"2/4 {len(examples)} adapters")
    held_out = {domain: _held_out(base, data, domain, settings) for domain in data.domains}
    fitted = fit_adapters(base, examples, how, run, held_out)
    made = provenance("adapters", settings)

    def write() -> dict[str, int]:
        return {
            domain: publish_adapter(settings.root, domain, one.weights, base.name, made)
            for domain, one in fitted.items()
        }

    # Each worker writes what it fitted, and measures it; one publishes all in one generation.
    written = _united(run.workers.each(write))
    if run.workers.is_first:
        publish_for_base(catalog, Change(adapters=written), state.base)
    changes = _united(run.workers.each(lambda: _losses(base, fitted, held_out)))
    if run.workers.is_first:
        lines = [f"{domain} {changes[domain]}" for domain in sorted(changes)]
        run.say(f"published {len(written)} adapters; validation loss, base -> adapter: {', '.join(lines)}")


def _united(parts: Sequence[Mapping[str, T]]) -> dict[str, T]:
    return {domain: value for part in parts for domain, value in part.items()}


def publish_adapter(root: Path, domain: str, weights: AdapterWeights, base_name: str, made: Mapping[str, Any]) -> int:
    """Write one adapter as the domain's next version and return its number. Not current until the catalog says so.

    `made` says what it was made of.
    """
    weights.check_finite()
    return write_version(
        root / "adapters" / domain, lambda folder: peft_format.save(folder, weights, f"base/{base_name}", dict(made))
    )


def _held_out(base: Base, data: DataSet, domain: str, settings: StageSettings) -> list[Example]:
    rows = data.rows("val", domain, settings.recipe.val_rows_per_domain)
    return encode(base.tokenizer, rows, settings.recipe.adapters.max_tokens)


def _losses(base: Base, fitted: Mapping[str, Fitted], held_out: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    examples = {domain: held_out[domain] for domain in fitted}
    before = mean_losses(base, {}, examples)
    after = mean_losses(base, {domain: one.weights for domain, one in fitted.items()}, examples)
    return {domain: f"{before[domain]:.2f} -> {after[domain]:.2f}" for domain in before}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills rows up: nothing reads it, so a base without a padding token may use any other."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
