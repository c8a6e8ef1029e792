"""Fits the adapters of any number of domains over one frozen base at once, as if each were trained alone.

A step takes one batch of every domain that is still learning. Their documents go through the base together; a domain's
loss is the mean over its own labelled tokens, its gradient is clipped by its own norm, and it has its own optimizer,
schedule and end. So nothing of one domain reaches another: fitting many gives what fitting each does, but for rounding;
and several workers that each fit some give what one does that fits all.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cluster.config.training import AdapterSettings
from cluster.lora.weights import AdapterWeights
from cluster.model.base import Base
from cluster.training.data import BatchPlan, Example
from cluster.training.early_stop import EarlyStop
from cluster.training.grouped_lora import AdapterShape, GroupedAdapters
from cluster.training.optimization import Optimizer, Training, load_checkpoint, save_checkpoint
from cluster.training.passes import OnePass, arrange, summed_by_domain
from cluster.training.run import Run
from cluster.training.workers import Workers


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of one domain."""

    weights: AdapterWeights
    num_steps: int
    """Steps it took: fewer than it was given where it was learned sooner."""
    loss: float
    """Mean training loss of its last eight steps, nats per token of the responses."""


class _Learner:
    """One domain: its batches, its training, and when it ends."""

    def __init__(
        self,
        domain: str,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        settings: AdapterSettings,
        adapters: GroupedAdapters,
        seed: int,
    ) -> None:
        self.domain, self._settings = domain, settings
        self._plan = BatchPlan(examples, settings.tokens_per_batch, pad_id=0, learn_prompts=False, seed=seed)
        optimizer = Optimizer(
            {"factors": adapters.parameter(domain)}, settings.learning_rate, settings.num_steps, keep_gradients=True
        )
        self.training = Training(domain, optimizer)
        self.held_out = held_out
        watches = settings.patience is not None and len(held_out) > 0
        self.early_stop = EarlyStop(adapters.parameter(domain), settings.patience or 1) if watches else None

    @property
    def is_learning(self) -> bool:
        is_over = self.early_stop is not None and self.early_stop.is_over
        is_learned = self.training.is_learned(self._settings.learned_loss)
        return self.training.num_steps < self._settings.num_steps and not is_learned and not is_over

    @property
    def is_to_be_measured(self) -> bool:
        """Whether its held-out rows say something now: every so many steps, and at its end."""
        is_due = self.training.num_steps % self._settings.validate_every_steps == 0 or not self.is_learning
        return self.early_stop is not None and is_due

    def examples(self) -> list[Example]:
        """The batch of its next step."""
        return [example for row in self._plan.rows(self.training.num_steps) for example in row]

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        stop = {} if self.early_stop is None else self.early_stop.tensors(f"{self.domain}:|")
        return self.training.tensors(f"{self.domain}:") | stop

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self.training.load_tensors(tensors, f"{self.domain}:")
        if self.early_stop is not None:
            self.early_stop.load_tensors(tensors, f"{self.domain}:|")


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How adapters are fitted."""

    adapters: AdapterSettings
    seed: int
    checkpoint_every_steps: int
    title: str = "adapters"
    """What people are told that is going on."""


def fit_adapters(
    base: Base,
    examples: Mapping[str, Sequence[Example]],
    settings: FitSettings,
    run: Run,
    held_out: Mapping[str, Sequence[Example]] | None = None,
) -> dict[str, Fitted]:
    """Fit an adapter for each domain on its examples: on several workers, those that are this one's. The base, which
    lies on the worker's device, is afterwards what it was. `held_out` is what a domain with patience is measured on.

    Raises `InvalidData` when a domain has no examples, `InvalidInput` when a target is no layer of the base.
    """
    mine = _part(examples, settings.adapters, run.workers)
    options = {domain: settings.adapters.of(domain) for domain in mine}
    adapters = GroupedAdapters(base.model)
    for domain, own in options.items():
        adapters.add(domain, AdapterShape(own.rank, own.alpha, own.targets), settings.seed)
    held_out = held_out or {}
    learners = [_Learner(d, examples[d], held_out.get(d, ()), options[d], adapters, settings.seed) for d in mine]
    _fit(OnePass(base.model, adapters), learners, settings, run)
    for learner in learners:
        if learner.early_stop is not None:
            learner.early_stop.finish()
    return {
        learner.domain: Fitted(
            adapters.weights(learner.domain, base.fingerprint), learner.training.num_steps, learner.training.loss
        )
        for learner in learners
    }


@torch.no_grad()
def mean_losses(
    base: Base,
    adapters: Mapping[str, AdapterWeights],
    examples: Mapping[str, Sequence[Example]],
    tokens_per_pass: int = 4096,
) -> dict[str, float]:
    """Mean loss of each domain's examples, nats per token of the responses: through its own adapter, or the plain base
    where it has none.
    """
    grouped = GroupedAdapters(base.model)
    for domain, weights in adapters.items():
        grouped.add_weights(domain, weights)
    one_pass = OnePass(base.model, grouped)
    with one_pass.open():
        return _mean_losses(one_pass, examples, tokens_per_pass)


@torch.no_grad()
def _mean_losses(
    one_pass: OnePass, examples: Mapping[str, Sequence[Example]], tokens_per_pass: int
) -> dict[str, float]:
    losses = dict.fromkeys(examples, 0.0)
    for batch in arrange(examples, tokens_per_pass):
        for domain, value in summed_by_domain(one_pass.losses(batch), batch).items():
            losses[domain] += float(value)
    return {d: losses[d] / sum(len(e.ids) - e.num_prompt_tokens for e in row) for d, row in examples.items() if row}


def _part(examples: Mapping[str, Sequence[Example]], settings: AdapterSettings, workers: Workers) -> list[str]:
    """The domains that this worker fits: every worker gets about the same number of tokens to learn from."""
    domains = list(examples)
    sizes = [settings.of(domain).num_steps * settings.of(domain).tokens_per_batch for domain in domains]
    return [domains[place] for place in workers.part(sizes)]


def _fit(one_pass: OnePass, learners: Sequence[_Learner], settings: FitSettings, run: Run) -> None:
    done = 0
    if (checkpoint := run.restore()) is not None:
        done, tensors = load_checkpoint(checkpoint)
        for learner in learners:
            learner.load_tensors(tensors)
        run.say(f"resuming the adapters at step {done}")
    run.start(settings.title, max((settings.adapters.of(learner.domain).num_steps for learner in learners), default=0))
    with one_pass.open():
        is_learning = any(run.workers.each(lambda: any(learner.is_learning for learner in learners)))
        while is_learning:
            # As many for all workers, since they wait for one another at a checkpoint.
            is_learning = any(run.workers.each(partial(_steps, one_pass, learners, done, settings, run)))
            done += settings.checkpoint_every_steps
            tensors = {}
            for learner in learners:
                learner.training.keep()
                tensors |= learner.tensors()
            run.checkpoint(partial(save_checkpoint, step=done, tensors=tensors, rank=run.workers.rank))


def _steps(one_pass: OnePass, learners: Sequence[_Learner], done: int, settings: FitSettings, run: Run) -> bool:
    """The steps up to the next checkpoint, fewer where all is learned before; whether something is left to learn."""
    tokens, since = 0, time.perf_counter()
    for step in range(done, done + settings.checkpoint_every_steps):
        learning = [learner for learner in learners if learner.is_learning]
        if not learning:
            return False
        tokens += _step(one_pass, learning, settings.adapters.tokens_per_pass, run)
        mean_loss = sum(learner.training.loss for learner in learners) / len(learners)
        run.report(step + 1, {"loss": mean_loss, "tokens/s": tokens / (time.perf_counter() - since)})
    return any(learner.is_learning for learner in learners)


def _step(one_pass: OnePass, learners: Sequence[_Learner], tokens_per_pass: int, run: Run) -> int:
    """One optimizer step of every domain that is still learning; the tokens it took, none of them padding."""
    rows = {learner.domain: learner.examples() for learner in learners}
    num_labels = {d: sum(len(e.ids) - e.num_prompt_tokens for e in row) for d, row in rows.items()}
    losses = dict.fromkeys(rows, 0.0)
    num_tokens = 0
    for batch in arrange(rows, tokens_per_pass):
        sums = summed_by_domain(one_pass.losses(batch), batch)
        torch.stack([sums[domain] / num_labels[domain] for domain in sums]).sum().backward()
        for domain, value in sums.items():
            losses[domain] += float(value.detach()) / num_labels[domain]
        num_tokens += len(batch.ids_T)
    to_measure = []
    for learner in learners:
        if (went_back := learner.training.step(losses[learner.domain])) is not None:
            run.say(went_back)
        elif learner.is_to_be_measured:
            to_measure.append(learner)
    _validate(one_pass, to_measure, tokens_per_pass)
    return num_tokens


def _validate(one_pass: OnePass, learners: Sequence[_Learner], tokens_per_pass: int) -> None:
    held_out = {learner.domain: learner.held_out for learner in learners}
    losses = _mean_losses(one_pass, held_out, tokens_per_pass)
    for learner in learners:
        assert learner.early_stop is not None
        learner.early_stop.tell(losses[learner.domain])
