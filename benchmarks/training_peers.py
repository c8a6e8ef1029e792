"""The same training by transformers' Trainer, and by PEFT under it: one domain after the other, as its users do.

Everything that decides the result is the same as ours: the packed rows and their order, the initial factors, AdamW and
its schedule, the clipping. What differs is who runs it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from cluster.lora.weights import AdapterWeights, Factors
from cluster.training.data import IGNORED_LABEL, Batch, Example, collate
from cluster.training.optimization import wsd

_BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained on, for how long."""

    steps: Sequence[Sequence[Sequence[Example]]]
    """The rows of each step, and the examples of each row."""
    learning_rate: float
    pad_id: int
    learn_prompts: bool = False
    weight_decay: float = 0.0


def train_with_trainer(model: PreTrainedModel, plan: Plan, passes_per_step: int, folder: str) -> float:
    """Train what asks for gradients, each step in so many passes; the seconds it took."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, others = ([p for p in trained if (p.dim() >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.learning_rate, betas=_BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: wsd(step, len(plan.steps)))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=len(plan.steps),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=passes_per_step,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_passes(plan, passes_per_step),
        data_collator=lambda items: items[0],
        optimizers=(optimizer, schedule),
        compute_loss_func=_loss,
    )
    trainer.remove_callback(PrinterCallback)
    since = time.perf_counter()
    trainer.train()
    return time.perf_counter() - since


def _passes(plan: Plan, passes_per_step: int) -> list[dict[str, Tensor]]:
    """The inputs of every pass; each step's rows are divided among so many."""
    passes = []
    for rows in plan.steps:
        assert len(rows) >= passes_per_step, "the Trainer takes as many passes for every step"
        bounds = [len(rows) * part // passes_per_step for part in range(passes_per_step + 1)]
        for start, end in pairwise(bounds):
            passes.append(_inputs(collate(rows[start:end], plan.pad_id, plan.learn_prompts)))
    return passes


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.ids_BT, "position_ids": batch.positions_BT, "labels": batch.labels_BT}


def _loss(outputs: Any, labels_BT: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Mean over the labels of a step, which are shifted already; the Trainer does not count the first of a row."""
    logits_BTV = outputs.logits
    summed = nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return summed / (num_items_in_batch if num_items_in_batch is not None else (labels_BT != IGNORED_LABEL).sum())


def train_with_peft(
    model: PreTrainedModel, start: AdapterWeights, plan: Plan, passes_per_step: int, folder: str
) -> tuple[AdapterWeights, float]:
    """One adapter that begins as `start`, by PEFT under the Trainer, and the seconds. `model` stays as it was."""
    some = next(iter(start.factors.values()))
    targets = sorted({name.rpartition(".")[2] for name in start.factors})
    alpha = round(some.scale * some.rank)
    config = LoraConfig(r=some.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    peft_model: Any = get_peft_model(model, config)
    layers: Mapping[str, Any] = {name: peft_model.get_submodule(f"base_model.model.{name}") for name in start.factors}
    with torch.no_grad():
        for name, factors in start.factors.items():
            layers[name].lora_A["default"].weight.copy_(factors.a_RI)
            layers[name].lora_B["default"].weight.copy_(factors.b_OR)
    seconds = train_with_trainer(peft_model, plan, passes_per_step, folder)
    trained = {
        name: Factors(
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
            some.scale,
        )
        for name, layer in layers.items()
    }
    peft_model.unload()
    return AdapterWeights(trained, start.base_fingerprint), seconds
