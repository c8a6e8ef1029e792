"""Training's figures: adapters of all domains in one pass beside PEFT's one after the other, pretraining beside the
Trainer, whether a run that was stopped gives what the unbroken one gives, and what whole libraries of adapters are
worth.

Both sides have the same rows in the same order, the same initial weights, optimizer, schedule, threads and 32-bit
numbers; a ratio is that of two runs that followed one another. Run it on an idle machine; --quick shows that it works.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from benchmarks.command import check_options, ended_well, scenario_parser, terminal
from benchmarks.figures import Measurement, Measurements, interleaved, paired_ratios
from benchmarks.report import in_words, result_line
from benchmarks.system import num_cores
from benchmarks.training_library import many_tasks, open_domains, read_tasks
from benchmarks.training_peers import Plan, train_with_peft, train_with_trainer
from benchmarks.training_run import QuietRun
from benchmarks.training_workers import Work, compare
from cluster.config.places import CHECKOUT
from cluster.config.training import AdapterSettings, BaseSettings
from cluster.lora.weights import AdapterWeights
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM
from cluster.model.base import Base
from cluster.model.configuration_zephyra import SIZES
from cluster.model.tokenizer import train_tokenizer
from cluster.training.data import BatchPlan, Example, encode, read_data
from cluster.training.grouped_lora import AdapterShape, GroupedAdapters
from cluster.training.one_pass import FitSettings, fit_adapters, mean_losses
from cluster.training.stage_base import fit_base

_DATA = CHECKOUT.parent / "shared" / "data" / "domains"
_PASSES_PER_STEP = (1, 2, 4)
"""What PEFT's batch size is chosen from."""
_NEVER = 10**9

_BASE = BaseSettings(num_steps=40, tokens_per_batch=2048, learning_rate=2e-3)
_ADAPTERS = AdapterSettings(rank=8, alpha=16, num_steps=20, tokens_per_batch=1536, learning_rate=2e-3, learned_loss=0)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is trained."""

    size: str = "mini"
    rows_per_domain: int = 2000
    max_tokens: int = 384
    base: BaseSettings = _BASE
    adapters: AdapterSettings = _ADAPTERS
    val_rows: int = 20
    rounds: int = 3
    is_quick: bool = False


QUICK = Effort(
    size="nano",
    rows_per_domain=120,
    max_tokens=128,
    base=BaseSettings(num_steps=8, tokens_per_batch=512, learning_rate=2e-3),
    adapters=AdapterSettings(rank=4, alpha=8, num_steps=4, tokens_per_batch=512, learning_rate=2e-3, learned_loss=0),
    val_rows=4,
    rounds=1,
    is_quick=True,
)


class Bench:
    """The data as token ids, a base that knows a little of them, and how much is to be done."""

    def __init__(self, data: Path, roots: Path, effort: Effort, console: Console) -> None:
        """`roots`: where whole systems are trained, or have been before."""
        self.data, self.roots = data, roots
        content = read_data(data)
        rows = {domain: content.rows("train", domain, effort.rows_per_domain) for domain in content.domains}
        texts = [text for some in rows.values() for row in some for text in (row.prompt, row.response)]
        config = ZephyraFusionConfig(**SIZES[effort.size])
        self.tokenizer: PreTrainedTokenizerBase = train_tokenizer(
            texts, config.vocab_size, config.max_position_embeddings
        )
        config.vocab_size = len(self.tokenizer)
        self.train = {d: encode(self.tokenizer, some, effort.max_tokens) for d, some in rows.items()}
        held_out = {d: content.rows("val", d, effort.val_rows) for d in content.domains}
        self.val = {d: encode(self.tokenizer, some, effort.max_tokens) for d, some in held_out.items()}
        torch.manual_seed(0)
        self.start: PreTrainedModel = ZephyraFusionForCausalLM(config)
        self.effort, self.console = effort, console
        self.trained: PreTrainedModel | None = None

    def base(self) -> Base:
        """The base that adapters are fitted on: trained for as long as pretraining is timed."""
        if self.trained is None:
            self.trained = copy.deepcopy(self.start)
            self._fit_base(self.trained)
        return Base(self.trained.eval().requires_grad_(False), self.tokenizer, "0" * 16, self.effort.size)

    def pretraining(self) -> Measurements:
        """Our loop over the Trainer's, by tokens per second."""
        examples = self._all_examples()
        settings = self.effort.base
        plan = BatchPlan(examples, settings.tokens_per_batch, 0, learn_prompts=True, seed=0)
        steps = [plan.rows(step) for step in range(settings.num_steps)]
        theirs = Plan(steps, settings.learning_rate, self.tokenizer.pad_token_id, True, settings.weight_decay)
        tokens = sum(_num_tokens(example) for rows in steps for row in rows for example in row)

        def ours() -> float:
            self.trained = copy.deepcopy(self.start)
            return tokens / _seconds(lambda: self._fit_base(self.trained or self.start))

        def trainer() -> float:
            with tempfile.TemporaryDirectory() as folder:
                return tokens / train_with_trainer(copy.deepcopy(self.start).train(), theirs, 1, folder)

        speeds = self._in_turn({"ours": ours, "trainer": trainer})
        return {
            "pretrain_tokens_per_s": Measurement(speeds["ours"]),
            "trainer_tokens_per_s": Measurement(speeds["trainer"]),
            "pretrain_over_trainer": Measurement(paired_ratios(speeds["ours"], speeds["trainer"])),
        }

    def adapters(self) -> Measurements:
        """All domains in one pass over PEFT's one after the other, by tokens per second; padding is not counted."""
        base = self.base()
        plans = {domain: self._plan(domain) for domain in self.train}
        tokens = sum(_num_tokens(e) for plan in plans.values() for rows in plan.steps for row in rows for e in row)
        passes = self._best_passes(base, plans)
        results: dict[str, dict[str, AdapterWeights]] = {}
        cpu_s: dict[str, list[float]] = {"ours": [], "peft": []}

        def ours() -> float:
            since = time.process_time()
            seconds = _seconds(lambda: results.update(ours=self._fit_adapters(base)))
            cpu_s["ours"].append(time.process_time() - since)
            return tokens / seconds

        def peft() -> float:
            since = time.process_time()
            fitted = {d: self._with_peft(base, d, plan, passes) for d, plan in plans.items()}
            cpu_s["peft"].append(time.process_time() - since)
            results["peft"] = {domain: weights for domain, (weights, _) in fitted.items()}
            return tokens / sum(seconds for _, seconds in fitted.values())

        speeds = self._in_turn({"ours": ours, "peft": peft})
        one, other = (mean_losses(base, results[name], self.val) for name in ("ours", "peft"))
        gap = max(abs(one[domain] / other[domain] - 1) for domain in one)
        return {
            "onepass_tokens_per_s": Measurement(speeds["ours"]),
            "peft_tokens_per_s": Measurement(speeds["peft"]),
            "onepass_over_peft": Measurement(paired_ratios(speeds["ours"], speeds["peft"])),
            "onepass_over_peft_cpu": Measurement(paired_ratios(cpu_s["peft"], cpu_s["ours"])),
            "onepass_loss_gap": Measurement((gap,)),
        }

    def bfloat16(self) -> Measurements:
        """Layers that multiply bfloat16 over those that multiply float32, by seconds, and what it does to the losses.

        Adapters are measured over the float32 base in either case, and the base by all validation rows.
        """
        start = self.base()
        narrow = replace(start, model=copy.deepcopy(start.model))
        nn.Module.to(narrow.model, torch.bfloat16)
        fitted: dict[str, dict[str, AdapterWeights]] = {}
        bases: dict[str, PreTrainedModel] = {}

        def fit_base_in(name: str, dtype: torch.dtype) -> float:
            bases[name] = copy.deepcopy(self.start)
            return _seconds(lambda: self._fit_base(bases[name], dtype=dtype))

        seconds = self._in_turn(
            {
                "adapters, float32": lambda: _seconds(lambda: fitted.update(wide=self._fit_adapters(start))),
                "adapters, bfloat16": lambda: _seconds(lambda: fitted.update(narrow=self._fit_adapters(narrow))),
                "base, float32": lambda: fit_base_in("wide", torch.float32),
                "base, bfloat16": lambda: fit_base_in("narrow", torch.bfloat16),
            }
        )
        one, other = (mean_losses(start, fitted[name], self.val) for name in ("narrow", "wide"))
        of_bases = {n: mean_losses(replace(start, model=m), {}, self.val) for n, m in bases.items()}
        base_gap = sum(of_bases["narrow"].values()) / sum(of_bases["wide"].values()) - 1
        return {
            "bfloat16_adapters_over_float32": Measurement(
                paired_ratios(seconds["adapters, float32"], seconds["adapters, bfloat16"])
            ),
            "bfloat16_adapters_loss_gap": Measurement((max(abs(one[d] / other[d] - 1) for d in one),)),
            "bfloat16_pretraining_over_float32": Measurement(
                paired_ratios(seconds["base, float32"], seconds["base, bfloat16"])
            ),
            "bfloat16_pretraining_loss_gap": Measurement((base_gap,)),
        }

    def resuming(self) -> Measurements:
        """1 if base and adapters that were stopped halfway and resumed equal the unbroken ones bit for bit."""
        whole, broken = copy.deepcopy(self.start), copy.deepcopy(self.start)
        self._fit_base(whole)
        _stopped(lambda run: self._fit_base(broken, run))
        same = all(torch.equal(p, whole.state_dict()[name]) for name, p in broken.state_dict().items())
        base, parts = self.base(), list[dict[str, AdapterWeights]]()
        unbroken = self._fit_adapters(base)
        _stopped(lambda run: parts.append(self._fit_adapters(base, run)))
        same = same and all(_are_equal(unbroken[domain], weights) for domain, weights in parts[-1].items())
        return {"resume_identical": Measurement((float(same),))}

    def workers(self) -> Measurements:
        """One worker over two by seconds, and how far their results are apart; once, and few steps."""
        base = self.effort.base.model_copy(update={"num_steps": min(12, self.effort.base.num_steps)})
        adapters = self.effort.adapters.model_copy(update={"num_steps": min(2, self.effort.adapters.num_steps)})
        work = Work(self.start, self.base().model, self.tokenizer, self.train, base, adapters)
        return compare(work)

    def open_domains(self) -> Measurements:
        """Every stage on the open domains."""
        folder = self.roots / "open_domains"
        return open_domains(self.data, folder, self.effort.is_quick, torch.get_num_threads(), self.console)

    def many_tasks(self) -> Measurements:
        """Every stage on the small tasks, whose folder lies beside that of the open domains."""
        tasks, folder = _tasks_beside(self.data), self.roots / "manytask"
        return many_tasks(tasks, folder, self.effort.is_quick, torch.get_num_threads(), self.console)

    def _all_examples(self) -> list[Example]:
        return [example for examples in self.train.values() for example in examples]

    def _fit_base(
        self, model: PreTrainedModel, run: "QuietRun | None" = None, dtype: torch.dtype = torch.float32
    ) -> None:
        every = _NEVER if run is None else max(1, self.effort.base.num_steps // 2)
        fit_base(model, self._all_examples(), self.effort.base, 0, every, run or QuietRun(), dtype)

    def _fit_adapters(self, base: Base, run: "QuietRun | None" = None) -> dict[str, AdapterWeights]:
        every = _NEVER if run is None else max(1, self.effort.adapters.num_steps // 2)
        fitted = fit_adapters(base, self.train, FitSettings(self.effort.adapters, 0, every), run or QuietRun())
        return {domain: one.weights for domain, one in fitted.items()}

    def _plan(self, domain: str) -> Plan:
        settings = self.effort.adapters
        plan = BatchPlan(self.train[domain], settings.tokens_per_batch, 0, learn_prompts=False, seed=0)
        steps = [plan.rows(step) for step in range(settings.num_steps)]
        return Plan(steps, settings.learning_rate, self.tokenizer.pad_token_id)

    def _with_peft(self, base: Base, domain: str, plan: Plan, passes_per_step: int) -> tuple[AdapterWeights, float]:
        fresh = GroupedAdapters(base.model)
        fresh.add(domain, AdapterShape(self.effort.adapters.rank, self.effort.adapters.alpha), seed=0)
        start = fresh.weights(domain, base.fingerprint)
        with tempfile.TemporaryDirectory() as folder:
            return train_with_peft(base.model, start, plan, passes_per_step, folder)

    def _best_passes(self, base: Base, plans: Mapping[str, Plan]) -> int:
        """The passes of a step with which PEFT is fastest, on the first steps of three domains."""
        least = min(len(rows) for plan in plans.values() for rows in plan.steps)
        tried = {}
        for passes in [count for count in _PASSES_PER_STEP if count <= least]:
            some = {d: Plan(plans[d].steps[:3], plans[d].learning_rate, plans[d].pad_id) for d in list(plans)[::4]}
            tried[passes] = sum(self._with_peft(base, d, plan, passes)[1] for d, plan in some.items())
        best = min(tried, key=lambda passes: tried[passes])
        words = ", ".join(f"{passes}: {seconds:.1f} s" for passes, seconds in tried.items())
        self.console.print(f"PEFT, passes per step ({words}): {best}", highlight=False)
        return best

    def _in_turn(self, runs: Mapping[str, Callable[[], float]]) -> dict[str, tuple[float, ...]]:
        return interleaved(runs, self.effort.rounds, lambda name: self.console.print(f"{name} ran", highlight=False))


class _Stopped(Exception):
    """Raised where a process would be killed."""


class _Resumed(QuietRun):
    """A run that keeps its checkpoints in a folder, and is stopped after the first if it `stops`."""

    def __init__(self, folder: Path, stops: bool = False) -> None:
        super().__init__()
        self._folder, self._stops = folder, stops

    def checkpoint(self, save: Callable[[Path], None]) -> None:
        if self._stops:
            save(self._folder)
            raise _Stopped

    def restore(self) -> Path | None:
        return None if self._stops else self._folder


def _stopped(train: Callable[[QuietRun], object]) -> None:
    """Run `train`, stop it at its first checkpoint, and run it again from there."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(_Resumed(Path(folder), stops=True))
        except _Stopped:
            train(_Resumed(Path(folder)))


def _are_equal(one: AdapterWeights, other: AdapterWeights) -> bool:
    return all(
        torch.equal(f.a_RI, other.factors[name].a_RI) and torch.equal(f.b_OR, other.factors[name].b_OR)
        for name, f in one.factors.items()
    )


def _tasks_beside(data: Path) -> Path:
    return data.parent / "manytask"


def _num_tokens(example: Example) -> int:
    return len(example.ids) - 1


def _seconds(work: Callable[[], object]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that is run for the figures it gives."""

    measure: Callable[[Bench], Measurements]
    what: str


SCENARIOS = {
    "pretraining": Scenario(Bench.pretraining, "tokens/s of stage 1 beside the transformers Trainer's"),
    "adapters": Scenario(Bench.adapters, "tokens/s and losses of all adapters in one pass beside PEFT's"),
    "bfloat16": Scenario(Bench.bfloat16, "layers that multiply bfloat16 over float32: seconds, losses"),
    "resuming": Scenario(Bench.resuming, "stopped and resumed against unbroken, bit for bit"),
    "workers": Scenario(Bench.workers, "two workers against one: seconds, losses, weights"),
    "open_domains": Scenario(Bench.open_domains, "13 real domains, trained in one job: table, what routing costs"),
    "manytask": Scenario(Bench.many_tasks, "275 tasks in one job: table by family, four shards, pruned to half"),
}


def main(arguments: list[str] | None = None) -> None:
    """The command. An error of the user's making ends it with a sentence and exit status 1."""
    parser = scenario_parser("training", __doc__, SCENARIOS)
    parser.add_argument("--data", type=Path, default=_DATA, help="folder of Parquet files, one domain or more")
    parser.add_argument("--size", choices=SIZES, help=f"of the base ({Effort().size})")
    parser.add_argument("--threads", type=int, default=num_cores(), help="all cores by default")
    parser.add_argument("--rounds", type=int, help=f"repeats of each run ({Effort().rounds})")
    parser.add_argument("--roots", type=Path, help="where whole systems are kept for the next time")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny base, to see that it works")
    options = parser.parse_args(arguments)
    errors = terminal(stderr=True)
    with ended_well(errors), tempfile.TemporaryDirectory() as temporary:
        check_options(options, positive=("threads", "rounds"), files=())
        torch.set_num_threads(options.threads)
        transformers_logging.set_verbosity_error()
        chosen = {"size": options.size, "rounds": options.rounds}
        given = {name: value for name, value in chosen.items() if value is not None}
        names = options.only or list(SCENARIOS)
        if "manytask" in names:  # an hour before it would be read
            read_tasks(_tasks_beside(options.data.resolve()))
        roots = (options.roots or Path(temporary)).resolve()
        bench = Bench(options.data.resolve(), roots, replace(QUICK if options.quick else Effort(), **given), errors)
        figures: Measurements = {}
        for name in names:
            measured = SCENARIOS[name].measure(bench)
            figures |= measured
            errors.print(f"{name}: {in_words(measured)}", highlight=False)
        for name, figure in figures.items():
            print(f"{name}: {figure.value:.4g} ({min(figure.repeats):.4g} to {max(figure.repeats):.4g})")
        print(result_line(figures), flush=True)


if __name__ == "__main__":
    main()
