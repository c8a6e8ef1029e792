"""What the stages of training are run with: the settings of each, and recipes that hold those of all.

The recipes themselves are in cluster/training/recipes.py.
"""

import hashlib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator

from cluster.config.places import is_hub_id
from cluster.config.settings import Settings

TrainingDtype = Literal["float32", "bfloat16", "auto"]
"""The numbers that layers multiply in training; auto: bfloat16 where the machine multiplies it, else float32."""


class RouterSettings(Settings):
    """How tiny ada is trained."""

    steps: int = Field(default=300, ge=1, le=1_000_000)
    """Optimizer steps, beside those that tune a sentence encoder."""
    batch_size: int = Field(default=256, ge=2, le=65_536)
    """Prompts of one step, drawn anew for each."""
    learning_rate: float = Field(default=0.01, gt=0, le=1)
    """Adam's rate at the start; it falls to zero along half a cosine."""
    width: int = Field(default=32, ge=8, le=1024)
    """Numbers of a feature's vector and of a prompt's."""
    prototypes_per_domain: int = Field(default=8, ge=1, le=1024)
    """The most prototypes of one domain; a domain of fewer examples has fewer."""
    hidden_domain_rate: float = Field(default=0.5, ge=0, le=1)
    """Share of the steps in which some domains are hidden and their prompts teach none."""
    word_dropout: float = Field(default=0.2, ge=0, lt=1)
    """Words other than keywords are hidden with a rate drawn anew for each prompt between 0 and twice this."""
    pair_dropout: float = Field(default=0.5, ge=0, le=0.5)
    """Pairs of neighbouring words are hidden with a rate drawn anew for each prompt between 0 and twice this: an unseen
    phrasing is made of known words in unseen pairs."""
    feature_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of all features that a step leaves out, each by itself: what many texts teach must not hang on one of them.
    Few texts need each that they have; with hundreds per domain, 0.4 is better."""
    word_omission: float = Field(default=0.0, ge=0, le=0.5)
    """Words other than keywords are left out whole, not just hidden, with a rate drawn anew for each prompt between 0
    and twice this; of short prompts fewer (decision 34). With hundreds of texts per domain, 0.3 is better."""
    naive_bayes: bool = False
    """Let features vote by how many texts of each domain hold them (decision 36). With hundreds of texts per domain
    that is better. Does nothing where the data names topics."""
    outlier_rate: float = Field(default=0.25, ge=0, lt=1)
    """Share of the prompts of a step that lose their keywords, and then teach none."""
    outlier_dropout: float = Field(default=0.2, ge=0, le=1)
    """Other words of such a prompt are hidden with a rate drawn anew for each between this and 1."""
    sketch_share: float = Field(default=0.0, ge=0, le=0.95)
    """Length of the sketch of rare words in a trained domain's prototypes, beside their vector's of 1; 0 leaves it out.
    With hundreds of texts per domain, 0.5 makes a domain that is added from examples take less from those that know
    their own words. Only where the data names topics: the texts of a prototype that found its share by itself have few
    rare words in common, and their sketch is mostly noise."""
    sentence_encoder: str | None = None
    """Folder of a pretrained sentence encoder in Hugging Face's format, or an installed package that carries one, to
    be tuned to the texts and to stand beside the n-grams; none by default. For bases of half a billion parameters and
    more."""
    teacher: str | None = None
    """Another such encoder, which is read in training only: tiny ada learns from it where texts and words lie. For
    bases of any size."""
    target_false_rejection: float = Field(default=0.01, gt=0, lt=1)
    """Share of a domain's prompts, in validation data, that the threshold may turn away as none."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """The same texts, settings and seed give the same router."""


class BaseSettings(Settings):
    """Stage 1: what base is trained, and for how long."""

    size: str = "starter"
    """A name of `cluster.model.configuration_zephyra.SIZES`."""
    general_only: bool = True
    """Learn from rows of `none` and `base` alone, so that the base knows no domain; else from all."""
    num_steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    tokens_per_batch: int = Field(default=1024, ge=64)
    """Tokens of one step, padding included."""
    tokens_per_pass: int = Field(default=8192, ge=64)
    """At most so many tokens of a step go through the base at once on a worker; gradients of the passes add up."""
    max_tokens: int = Field(default=256, ge=16)
    """Longer rows are cut."""
    learning_rate: float = Field(default=4e-3, gt=0, le=1)
    """Peak rate of AdamW."""
    weight_decay: float = Field(default=0.05, ge=0, le=1)
    """Of matrices; of nothing else."""


class DomainAdapterSettings(Settings):
    """What one domain has of its own; what is not given is as for all."""

    rank: int | None = Field(default=None, ge=1, le=1024)
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] | None = None
    num_steps: int | None = Field(default=None, ge=1)
    tokens_per_batch: int | None = Field(default=None, ge=64)
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    learned_loss: float | None = Field(default=None, ge=0)
    patience: int | None = Field(default=None, ge=1)


class AdapterSettings(Settings):
    """Stage 2: one LoRA adapter per domain, the base frozen."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Columns of one adapter per layer."""
    alpha: float = Field(default=32.0, gt=0)
    """The delta is alpha / rank times B A."""
    targets: tuple[str, ...] = ()
    """Layers that an adapter changes, by the last part of their names, such as q_proj; empty for all."""
    num_steps: int = Field(default=180, ge=1)
    """Optimizer steps of each domain."""
    tokens_per_batch: int = Field(default=512, ge=64)
    """At most so many tokens of one domain in one step."""
    tokens_per_pass: int = Field(default=2048, ge=64)
    """At most so many tokens of all domains go through the base at once. Changes speed and memory, and no result."""
    max_tokens: int = Field(default=256, ge=16)
    """Longer rows are cut."""
    learning_rate: float = Field(default=4e-3, gt=0, le=1)
    """Peak rate of AdamW."""
    learned_loss: float = Field(default=0.005, ge=0)
    """A domain whose mean loss over eight steps lies below this is learned and takes no further steps."""
    patience: int | None = Field(default=None, ge=1)
    """So many measurements in a row on the validation rows that are no better end a domain, at its best weights; None
    measures none."""
    validate_every_steps: int = Field(default=10, ge=1)
    """With `patience`: steps of a domain between two measurements."""
    domains: dict[str, DomainAdapterSettings] = Field(default={})
    """Domains that have something of their own."""

    def of(self, domain: str) -> Self:
        """The settings of one domain."""
        own = self.domains.get(domain, DomainAdapterSettings()).model_dump(exclude_none=True)
        return self.model_copy(update={**own, "domains": {}})


class JointSettings(Settings):
    """Stage 4: adapters and router together, each prompt through its own soft mixture; the base frozen, or nearly."""

    num_steps: int = Field(default=16, ge=0)
    """Optimizer steps; 0 leaves the stage out."""
    rows_per_domain: int = Field(default=4, ge=1)
    """Rows of each domain in one step."""
    max_tokens: int = Field(default=256, ge=16)
    """Longer rows are cut."""
    adapter_learning_rate: float = Field(default=3e-4, gt=0, le=1)
    """Peak rate for the adapters: a small part of stage 2's."""
    router_learning_rate: float = Field(default=1e-4, gt=0, le=1)
    """Peak rate for the router's encoder."""
    base_learning_rate: float = Field(default=0.0, ge=0, le=1)
    """Peak rate for the base, a hundredth of the adapters' or less; 0 leaves it frozen. Else base, adapters and router
    are published in one generation."""
    router_loss_weight: float = Field(default=0.1, ge=0)
    """Weight of the router's labels beside the language-model loss."""
    epsilon: float = Field(default=0.005, ge=0)
    """The stage is dropped if some domain's validation loss rises by more than this share and by more than
    `tolerance_nats`."""
    tolerance_nats: float = Field(default=0.02, ge=0)
    """Nats per token: a rise below this is let pass. Where an adapter is nearly always right it changes no answer."""
    least_effective_share: float = Field(default=0.8, ge=0, le=1)
    """The stage is dropped if the effective number of domains that prompts are sent to falls below this share of what
    it was: the router then collapses onto few."""


class BadRowSettings(Settings):
    """Which rows are left out as bad, and how many may be."""

    share: float = Field(default=0.01, ge=0, le=1)
    """Of all rows; with more bad ones nothing is trained."""
    at_least: int = Field(default=5, ge=0)
    """So many may be bad, however few rows there are."""
    max_characters: int = Field(default=100_000, ge=1)
    """A longer text makes its row a bad one: all of it would be tokenized, and all but the beginning cut."""


class Recipe(Settings):
    """Settings of all four stages, under one name."""

    base: BaseSettings = BaseSettings()
    adapters: AdapterSettings = AdapterSettings()
    router: RouterSettings = RouterSettings()
    joint: JointSettings = JointSettings()
    bad_rows: BadRowSettings = BadRowSettings()
    dtype: TrainingDtype = "float32"
    """What the layers of a base multiply while it, or adapters over it, are trained; what is trained stays float32."""
    train_rows_per_domain: int = Field(default=20_000, ge=1)
    """At most so many rows of each domain are learned from."""
    val_rows_per_domain: int = Field(default=100, ge=1)
    """At most so many rows of each domain are measured after a stage."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """The same data, recipe and seed give the same system, but for rounding between machines."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """A stage that is stopped resumes from its newest checkpoint."""


class LiveDomainSettings(Settings):
    """A domain that is added to a trained system, and what is measured before it is published."""

    domain: str
    """Its name."""
    others: Path | None = None
    """Folder of the other domains' data, to measure what they lose; None where it is not known."""
    least_recall: float = Field(default=0.5, ge=0, le=1)
    """Share of its own held-out prompts that the router must send to it."""
    epsilon: float = Field(default=0.05, ge=0, le=1)
    """The most that any other domain's share of prompts that find it may fall."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Of its rows, where the data holds out none itself."""


class StageSettings(Settings):
    """What one stage is run with."""

    root: Path
    """Where artifacts are read and published; absolute."""
    data: Path
    """Folder of Parquet files or saved data sets, or one Parquet file for stage `domain`; absolute."""
    recipe: Recipe
    name: str
    """The recipe's name, kept in the artifacts."""
    base: str | None = None
    """A base to take over instead of training one: an absolute folder, or an id on the Hugging Face hub."""
    live: LiveDomainSettings | None = None
    """Of stage `domain` alone."""

    @property
    def mark(self) -> str:
        """Eight hex digits that differ when a setting or a file of the data does: only under the same is a checkpoint
        resumed.
        """
        below = [file for file in sorted(self.data.rglob("*")) if file.suffix in (".parquet", ".arrow")]
        files = [self.data] if self.data.is_file() else below
        # Not their digests, which would read them all; who writes to a file changes its time.
        seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.blake2b(f"{self.model_dump_json()} {seen}".encode(), digest_size=4).hexdigest()

    @field_validator("root", "data")
    @classmethod
    def _is_absolute(cls, path: Path) -> Path:
        if not path.is_absolute():
            raise ValueError(f"{path} is relative; give an absolute path: a job runs in a temporary copy of the code")
        return path

    @field_validator("base")
    @classmethod
    def _is_absolute_or_an_id(cls, base: str | None) -> str | None:
        if base is not None and not Path(base).is_absolute() and not is_hub_id(base):
            raise ValueError(f"{base} is neither an absolute folder nor an id such as org/name; give one of both")
        return base
