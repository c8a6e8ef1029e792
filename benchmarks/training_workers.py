"""The same training by one worker and by two: processes of their own that speak through gloo, as Ray Train's do."""

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.figures import Measurement, Measurements
from benchmarks.training_run import QuietRun
from cluster.config.training import AdapterSettings, BaseSettings
from cluster.model.base import Base
from cluster.training.data import Example
from cluster.training.one_pass import FitSettings, fit_adapters
from cluster.training.stage_base import fit_base
from cluster.training.workers import Workers

_NEVER = 10**9


@dataclass(frozen=True, slots=True)
class Work:
    """What is trained, from where."""

    start: PreTrainedModel
    trained: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: dict[str, list[Example]]
    base: BaseSettings
    adapters: AdapterSettings


def compare(work: Work) -> Measurements:
    """Seconds of one worker over those of two, each with one thread; and how far the results are apart."""
    one, two = _run(1, work), _run(2, work)
    figures = {}
    for kind, name in (("data_parallel", "base"), ("sharded", "sharded_base")):
        figures[f"workers_{name}_speedup"] = _ratio(one, "data_parallel", two, kind)
        gap = (two[f"{kind}|losses"] / one["data_parallel|losses"] - 1).abs().max()
        figures[f"workers_{name}_loss_gap"] = float(gap)
    fitted = [name for name in one if name.startswith("adapters|") and name != "adapters|seconds"]
    figures["workers_adapters_speedup"] = _ratio(one, "adapters", two, "adapters")
    figures["workers_adapters_identical"] = float(all(torch.equal(one[name], two[name]) for name in fitted))
    return {name: Measurement((value,)) for name, value in figures.items()}


def _ratio(one: Mapping[str, Tensor], kind: str, two: Mapping[str, Tensor], other: str) -> float:
    return float(one[f"{kind}|seconds"] / two[f"{other}|seconds"])


def _run(count: int, work: Work) -> dict[str, Tensor]:
    """What so many workers trained together, and the seconds that the slower of them took."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (count, work, Path(folder)), nprocs=count)
        parts = [load_file(Path(folder) / f"{rank}.safetensors") for rank in range(count)]
    whole = {name: value for part in reversed(parts) for name, value in part.items()}
    slowest = {n: torch.stack([part[n] for part in parts]).max() for n in whole if n.endswith("|seconds")}
    return whole | slowest


def _work(rank: int, count: int, work: Work, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    out: dict[str, Tensor] = {}
    kinds = {"data_parallel": False, "sharded": True} if count > 1 else {"data_parallel": False}
    for kind, shards in kinds.items():
        run = QuietRun(Workers(rank, count, shards))
        examples = [example for some in work.train.values() for example in some]
        fit_all = partial(fit_base, copy.deepcopy(work.start), examples, work.base, 0, _NEVER, run)
        out[f"{kind}|seconds"] = _seconds(fit_all)
        if rank == 0:
            out[f"{kind}|losses"] = torch.tensor(run.losses, dtype=torch.float64)
    base = Base(work.trained.eval().requires_grad_(False), work.tokenizer, "0" * 16, "trained")
    run = QuietRun(Workers(rank, count))
    settings = FitSettings(work.adapters, 0, _NEVER)

    def fit() -> None:
        for domain, one in fit_adapters(base, work.train, settings, run).items():
            for name, f in one.weights.factors.items():
                out[f"adapters|{domain}|{name}|a"] = f.a_RI.contiguous()
                out[f"adapters|{domain}|{name}|b"] = f.b_OR.contiguous()

    out["adapters|seconds"] = _seconds(fit)
    save_file(out, folder / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(work: Callable[[], None]) -> Tensor:
    dist.barrier()
    since = time.perf_counter()
    work()
    return torch.tensor(time.perf_counter() - since)
