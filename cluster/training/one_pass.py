"""Fits the adapters of any number of domains over one frozen base at once, as if each were trained alone.

A step takes one batch of every domain that is still learning. Their documents go through the base together; a domain's
loss is the mean over its own labelled tokens, its gradient is clipped by its own norm, and it has its own optimizer,
schedule and end. So nothing of one domain reaches another: fitting many gives what fitting each does, but for rounding.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cluster.config import AdapterSettings
from cluster.lora.weights import AdapterWeights
from cluster.model.base import Base
from cluster.training.data import BatchPlan, Example
from cluster.training.grouped_lora import AdapterShape, GroupedAdapters
from cluster.training.optimization import Optimizer, load_checkpoint, save_checkpoint
from cluster.training.passes import OnePass, arrange, summed_by_domain
from cluster.training.run import Run

_RECENT_STEPS = 8
"""Steps whose mean loss says whether a domain is learned."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of one domain."""

    weights: AdapterWeights
    num_steps: int
    """Steps it took: fewer than it was given where it was learned sooner."""
    loss: float
    """Mean training loss of its last eight steps, nats per token of the responses."""


class _Learner:
    """One domain: its batches, its optimizer, and how far it is."""

    def __init__(
        self, domain: str, examples: Sequence[Example], settings: AdapterSettings, adapters: GroupedAdapters, seed: int
    ) -> None:
        self.domain, self._settings = domain, settings
        self._plan = BatchPlan(examples, settings.tokens_per_batch, pad_id=0, learn_prompts=False, seed=seed)
        self._optimizer = Optimizer(
            {"factors": adapters.parameter(domain)}, settings.learning_rate, settings.num_steps, keep_gradients=True
        )
        self._recent = torch.full((_RECENT_STEPS,), math.inf, dtype=torch.float64)
        self.num_steps = 0

    @property
    def loss(self) -> float:
        """Mean loss of its last steps."""
        return float(self._recent[torch.isfinite(self._recent)].mean())

    @property
    def is_learning(self) -> bool:
        is_learned = float(self._recent.mean()) < self._settings.learned_loss
        return self.num_steps < self._settings.num_steps and not is_learned

    def examples(self) -> list[Example]:
        """The batch of its next step."""
        return [example for row in self._plan.rows(self.num_steps) for example in row]

    def step(self, loss: float) -> None:
        """Apply the gradients of a batch of this mean loss."""
        self._optimizer.step(self.num_steps)
        self._recent[self.num_steps % _RECENT_STEPS] = loss
        self.num_steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        progress = {"recent": self._recent.clone(), "num_steps": torch.tensor(self.num_steps)}
        return {f"{self.domain}|{name}": value for name, value in progress.items()} | self._optimizer.tensors(
            f"{self.domain}:"
        )

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        self._optimizer.load_tensors(tensors, f"{self.domain}:")
        self._recent = tensors[f"{self.domain}|recent"]
        self.num_steps = int(tensors[f"{self.domain}|num_steps"])


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How adapters are fitted."""

    adapters: AdapterSettings
    seed: int
    checkpoint_every_steps: int
    title: str = "adapters"
    """What people are told that is going on."""


def fit_adapters(
    base: Base, examples: Mapping[str, Sequence[Example]], settings: FitSettings, run: Run
) -> dict[str, Fitted]:
    """Fit an adapter for each domain on its examples. The base is afterwards what it was.

    Raises `InvalidData` when a domain has no examples, `InvalidInput` when a target is no layer of the base.
    """
    options = {domain: settings.adapters.of(domain) for domain in examples}
    adapters = GroupedAdapters(base.model)
    for domain, own in options.items():
        adapters.add(domain, AdapterShape(own.rank, own.alpha, own.targets), settings.seed)
    learners = [_Learner(d, examples[d], options[d], adapters, settings.seed) for d in examples]
    _fit(OnePass(base.model, adapters), learners, settings, run)
    return {
        learner.domain: Fitted(adapters.weights(learner.domain, base.fingerprint), learner.num_steps, learner.loss)
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
    losses = dict.fromkeys(examples, 0.0)
    with one_pass.open():
        for batch in arrange(examples, tokens_per_pass):
            for domain, value in summed_by_domain(one_pass.losses(batch), batch).items():
                losses[domain] += float(value)
    return {d: losses[d] / sum(len(e.ids) - e.num_prompt_tokens for e in row) for d, row in examples.items() if row}


def _fit(one_pass: OnePass, learners: Sequence[_Learner], settings: FitSettings, run: Run) -> None:
    first = 0
    if (checkpoint := run.restore()) is not None:
        first, tensors = load_checkpoint(checkpoint)
        for learner in learners:
            learner.load_tensors(tensors)
        run.say(f"resuming the adapters at step {first}")
    num_steps = max(settings.adapters.of(learner.domain).num_steps for learner in learners)
    run.start(settings.title, num_steps)
    tokens, since = 0, time.perf_counter()
    with one_pass.open():
        for step in range(first, num_steps):
            learning = [learner for learner in learners if learner.is_learning]
            tokens += _step(one_pass, learning, settings.adapters.tokens_per_pass)
            mean_loss = sum(learner.loss for learner in learners) / len(learners)
            run.report(step + 1, {"loss": mean_loss, "tokens/s": tokens / (time.perf_counter() - since)})
            if (step + 1) % settings.checkpoint_every_steps == 0:
                state = {name: value for learner in learners for name, value in learner.tensors().items()}
                run.checkpoint(partial(save_checkpoint, step=step + 1, tensors=state))


def _step(one_pass: OnePass, learners: Sequence[_Learner], tokens_per_pass: int) -> int:
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
    for learner in learners:
        learner.step(losses[learner.domain])
    return num_tokens
