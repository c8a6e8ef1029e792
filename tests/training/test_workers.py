"""Two workers against one: real processes that speak through gloo, as Ray Train's do."""

import itertools
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.config.training import BaseSettings
from cluster.errors import InvalidInput
from cluster.model import ZephyraFusionForCausalLM
from cluster.training import stage_base
from cluster.training.compute import DTYPES
from cluster.training.documents import documents
from cluster.training.one_pass import FitSettings, Fitted, fit_adapters
from cluster.training.optimization import Optimizer
from cluster.training.passes import Pass, arrange, token_losses
from cluster.training.run import Run
from cluster.training.sharding import shard, whole, whole_model
from cluster.training.stage_base import _backward, fit_base
from cluster.training.workers import Workers, balanced
from tests.model.nano import nano_model
from tests.training.rows import nano_tokenizer, some_examples
from tests.training.runs import FolderRun, Stopped
from tests.training.test_one_pass import EXAMPLES, SETTINGS, _base

NUM_STEPS, EVERY = 8, 3
TOKENS_PER_PASS = (48, 100_000)
"""Of which the first gives the two workers different numbers of passes."""
BASE = BaseSettings(num_steps=NUM_STEPS, tokens_per_batch=256, learning_rate=1e-3)


class _StoppedRun(FolderRun):
    """A run that ends at its first checkpoint."""

    def checkpoint(self, save: Callable[[Path], None]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        save(self._folder)
        raise Stopped


class _Run(_StoppedRun):
    """A run that doesn't."""

    def checkpoint(self, save: Callable[[Path], None]) -> None:
        try:
            super().checkpoint(save)
        except Stopped:
            return


def _model() -> ZephyraFusionForCausalLM:
    return nano_model(vocab_size=len(nano_tokenizer())).requires_grad_(True)


def _fit_base(run: Run, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model: Any = _model()
    fit_base(model, some_examples(nano_tokenizer(), 36), BASE, 3, EVERY, run, dtype)
    whole = whole_model(model, _model()) if run.workers.shards_base else model
    return {name: parameter.detach() for name, parameter in whole.named_parameters()}


@torch.no_grad()
def _loss(weights: Mapping[str, Tensor]) -> float:
    """Of a base with these weights, on what it learns from."""
    model: Any = _model()
    model.load_state_dict(weights, strict=False)
    examples = some_examples(nano_tokenizer(), 36)
    (batch,) = arrange({"": examples}, 10**9, learn_prompts=True)
    with documents(model) as takes_lengths:
        return float(token_losses(model, batch, takes_lengths).mean())


def _fit_poisoned_base(run: FolderRun) -> dict[str, Tensor]:
    """The same, where the loss of step 5 is no number the first time, on the last worker alone."""
    real, calls = stage_base.token_losses, 0

    def token_losses(model: PreTrainedModel, batch: Pass, takes_lengths: bool) -> Tensor:
        nonlocal calls
        calls += 1
        is_broken = calls == 5 and run.workers.rank == run.workers.count - 1
        return real(model, batch, takes_lengths) * (math.nan if is_broken else 1.0)

    stage_base.token_losses = token_losses
    try:
        return _fit_base(run)
    finally:
        stage_base.token_losses = real


def _gradients(workers: Workers, tokens_per_pass: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of the mean loss of some rows of many lengths, divided among the workers and into passes."""
    model: Any = _model()
    if workers.shards_base:
        shard(model, dtype)
    else:
        model.to(dtype)
    optimizer = Optimizer(dict(model.named_parameters()), 1e-3, NUM_STEPS)
    with documents(model) as takes_lengths:
        loss = _backward(model, optimizer, some_examples(nano_tokenizer(), 7), tokens_per_pass, workers, takes_lengths)
    names = [name for name, _ in model.named_parameters()]
    return {**whole(dict(zip(names, optimizer.gradients(), strict=True))), "loss": torch.tensor(loss)}


def _fit_adapters(run: Run) -> dict[str, Tensor]:
    return _tensors(
        fit_adapters(_base(_model()), EXAMPLES, FitSettings(SETTINGS, seed=3, checkpoint_every_steps=3), run)
    )


def _tensors(fitted: dict[str, Fitted]) -> dict[str, Tensor]:
    out = {}
    for domain, one in fitted.items():
        out[f"{domain}|loss"] = torch.tensor([one.loss, one.num_steps], dtype=torch.float64)
        for name, f in one.weights.factors.items():
            out[f"{domain}|{name}|a"], out[f"{domain}|{name}|b"] = f.a_RI.contiguous(), f.b_OR.contiguous()
    return out


KINDS: dict[str, tuple[Callable[[Run], dict[str, Tensor]], bool]] = {
    "data-parallel base": (_fit_base, False),
    "sharded base": (_fit_base, True),
    "bfloat16 data-parallel base": (partial(_fit_base, dtype=torch.bfloat16), False),
    "bfloat16 sharded base": (partial(_fit_base, dtype=torch.bfloat16), True),
    "adapters": (_fit_adapters, False),
}


def _work(rank: int, folder: Path) -> None:
    """What one of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for shards, tokens_per_pass, dtype in itertools.product((False, True), TOKENS_PER_PASS, DTYPES.values()):
        gradients = _gradients(Workers(rank, 2, shards), tokens_per_pass, dtype)
        save_file(gradients, folder / f"gradients-{shards}-{tokens_per_pass}-{dtype}-{rank}")
    for kind, (fit, shards) in KINDS.items():
        workers = Workers(rank, 2, shards)
        save_file(fit(_Run(folder / f"{kind} whole", workers=workers)), folder / f"{kind}-whole-{rank}")
        with pytest.raises(Stopped):
            fit(_StoppedRun(folder / f"{kind} broken", workers=workers))
        dist.barrier()
        save_file(fit(_Run(folder / f"{kind} broken", workers=workers)), folder / f"{kind}-resumed-{rank}")

    for shards in (False, True):
        run = _Run(folder / f"poisoned {shards}", workers=Workers(rank, 2, shards))
        save_file(_fit_poisoned_base(run), folder / f"poisoned-{shards}-{rank}")
        (folder / f"said-{shards}-{rank}").write_text("\n".join(run.said))

    def gives_up() -> int:
        if rank == 1:
            raise InvalidInput("The rank is 1.")
        return rank

    workers = Workers(rank, 2)
    assert workers.each(lambda: rank * 10) == [0, 10]
    with pytest.raises(InvalidInput, match=r"The rank is 1\."):
        workers.each(gives_up)
    dist.destroy_process_group()
    # Everything is written. An orderly end of the interpreter aborts now and then, where gloo's threads are taken down.
    os._exit(0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two workers left what they trained."""
    folder = tmp_path_factory.mktemp("two")
    # Both are forked from one process that has imported everything: that takes longer than all that they do.
    mp.set_forkserver_preload([__name__])
    mp.start_processes(_work, (folder,), nprocs=2, start_method="forkserver")
    return folder


def _read(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}-{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("tokens_per_pass", TOKENS_PER_PASS)
@pytest.mark.parametrize("shards", [False, True, None])
def test_gradients_are_those_of_the_mean_over_all_tokens(
    shards: bool | None, tokens_per_pass: int, dtype: torch.dtype, two: Path
) -> None:
    examples, model = some_examples(nano_tokenizer(), 7), _model()
    # Written out: each document alone, every token with the same weight.
    losses = []
    for example in examples:
        ids = torch.tensor(example.ids)
        losses.append(nn.functional.cross_entropy(model(input_ids=ids[None, :-1]).logits[0], ids[1:], reduction="sum"))
    mean = torch.stack(losses).sum() / sum(len(example.ids) - 1 for example in examples)
    mean.backward()
    sizes = [len(example.ids) - 1 for example in examples]
    counts = [
        len(arrange({"": [examples[place] for place in part]}, tokens_per_pass, learn_prompts=True))
        for part in balanced(sizes, 2)
    ]
    assert (counts[0] != counts[1]) == (tokens_per_pass == TOKENS_PER_PASS[0])
    alone = [_gradients(Workers(), tokens_per_pass, dtype)]
    for part in alone if shards is None else _read(two, f"gradients-{shards}-{tokens_per_pass}-{dtype}"):
        assert all(tensor.dtype == torch.float32 for tensor in part.values())
        if dtype == torch.bfloat16:
            # Of each weight's gradient, in the length of it.
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                assert (part[name] - parameter.grad).norm() < 0.03 * parameter.grad.norm(), name
            continue
        torch.testing.assert_close(part["loss"], mean.detach())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(part[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("base")])
def test_a_base_by_two_workers_is_that_of_one_but_for_rounding(kind: str, two: Path, tmp_path: Path) -> None:
    fit, _ = KINDS[kind]
    alone = fit(FolderRun(tmp_path / "alone"))
    start = dict(_model().named_parameters())
    one, other = _read(two, f"{kind}-whole")
    for name, parameter in alone.items():
        assert torch.equal(one[name], other[name]), "both workers hold the same"
        moved = (parameter - start[name]).abs().max()
        assert fit is not _fit_base or (one[name] - parameter).abs().max() < 0.05 * moved, name
    # In bfloat16 single numbers round the other way, which AdamW makes large; what is learned is the same.
    learned = _loss(start) - _loss(alone)
    assert learned > 0.2
    assert abs(_loss(one) - _loss(alone)) < 0.03 * learned


@pytest.mark.parametrize("shards", [False, True])
def test_a_loss_that_is_no_number_on_one_worker_takes_all_back_as_it_takes_one(
    shards: bool, two: Path, tmp_path: Path
) -> None:
    run = _Run(tmp_path / "alone")
    alone = _fit_poisoned_base(run)
    told = ["base: the loss of step 5 is no finite number; back to step 3, at 1/2 of the rate"]
    assert run.said == told
    assert [(two / f"said-{shards}-{rank}").read_text() for rank in (0, 1)] == [*told, ""], "one speaks for all"
    unpoisoned = _fit_base(FolderRun(tmp_path / "unpoisoned"))
    one, other = _read(two, f"poisoned-{shards}")
    for name, parameter in alone.items():
        assert torch.equal(one[name], other[name])
        halved = (parameter - unpoisoned[name]).abs().max()
        assert (one[name] - parameter).abs().max() < 0.05 * halved, name


def test_adapters_by_two_workers_are_those_of_one_bit_for_bit(two: Path, tmp_path: Path) -> None:
    alone = _fit_adapters(FolderRun(tmp_path / "alone"))
    one, other = _read(two, "adapters-whole")
    assert not one.keys() & other.keys()
    assert all({name.partition("|")[0] for name in part} for part in (one, other)), "both had something to do"
    both = one | other
    assert both.keys() == alone.keys()
    assert all(torch.equal(both[name], alone[name]) for name in alone)


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_killed_and_resumed_are_unbroken_bit_for_bit(kind: str, two: Path) -> None:
    for unbroken, resumed in zip(_read(two, f"{kind}-whole"), _read(two, f"{kind}-resumed"), strict=True):
        assert unbroken.keys() == resumed.keys()
        assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_one_worker_goes_on_from_the_checkpoint_of_two(two: Path) -> None:
    alone = _fit_adapters(_Run(two / "adapters broken"))
    one, other = _read(two, "adapters-whole")
    assert all(torch.equal(value, alone[name]) for name, value in (one | other).items())


def test_work_is_divided_evenly_and_always_the_same_way() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 7):
        sizes: list[int] = torch.randint(1, 100, (20,), generator=generator).tolist()
        groups = balanced(sizes, count)
        assert sorted(place for group in groups for place in group) == list(range(20))
        assert all(a < b for group in groups for a, b in pairwise(group))
        sums = [sum(sizes[place] for place in group) for group in groups]
        assert max(sums) <= 4 / 3 * max(sum(sizes) / count, max(sizes))
        assert groups == balanced(list(sizes), count)
    assert balanced([5, 5], 3) == [[0], [1], []]
