"""The engine's figures, each beside what bounds it, and beside other systems where they are there.

Measures on a folder that `python -m benchmarks.random_model` writes; --quick makes a tiny one and runs a little of
everything, to see that it works. Run it on an idle machine: what else runs is measured too.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.bench import QUICK, Bench, Effort, Peers, Quality
from benchmarks.command import check_options, ended_well, scenario_parser
from benchmarks.figures import Measurements
from benchmarks.peers import beside_peers, check_peers
from benchmarks.profiling import print_profile
from benchmarks.quantized import decode_rates, quality_rises
from benchmarks.random_model import SHAPES, write_random_model
from benchmarks.report import in_words, machine_words, print_table, result_line, write_json
from benchmarks.system import TimedModel, num_cores, read_bandwidth
from benchmarks.throughput import MANY, idle_adapters, serving, sharing
from benchmarks.turnover import cliff, crowded_cliff, hot_and_cold
from cluster.config.places import CHECKOUT
from cluster.errors import InvalidInput
from cluster.lora.catalog import Catalog
from cluster.training.pipeline import data_of


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that is run for the figures it gives."""

    measure: Callable[[Bench], Measurements]
    what: str
    num_adapters: int = 1
    """That the model must at least have."""


SCENARIOS = {
    "serving": Scenario(serving, "tokens/s of the base and of adapters in turn at 1, 8 and 16 requests"),
    "sharing": Scenario(sharing, "distinct adapters and mixtures against one adapter each", MANY),
    "idle": Scenario(idle_adapters, "base-only requests with adapters resident"),
    "cliff": Scenario(cliff, "a working set of twice the slot bank"),
    "crowded": Scenario(crowded_cliff, "the same with twice as many requests in flight as can have their adapter"),
    "hot": Scenario(hot_and_cold, "one hot and 50 cold domains"),
    "quantized": Scenario(decode_rates, "int8 and int4 decode at 1 request, and memory"),
    "quality": Scenario(quality_rises, "what int8 and int4 cost in perplexity (needs --quality-model)"),
    "peers": Scenario(beside_peers, "PEFT and vLLM on the same workload (needs --peers)"),
}


def main(arguments: list[str] | None = None) -> None:
    """The command. An error of the user's making ends it with a sentence and exit status 1."""
    options = _parser().parse_args(arguments)
    # The table and the line RESULT go to standard output, everything else to standard error.
    errors = Console(stderr=True)
    with ended_well(errors):
        _run(options, errors)


def _parser() -> argparse.ArgumentParser:
    parser = scenario_parser("engine", __doc__, SCENARIOS)
    parser.add_argument("--model", type=Path, help="folder with base/, lora0/, lora1/, ...")
    parser.add_argument("--adapters", type=int, default=8, help="adapters that mixed loads take in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the engine runs")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of the products; all cores by default")
    parser.add_argument("--rounds", type=int, help=f"repeats of each load ({Effort().rounds})")
    parser.add_argument("--quick", action="store_true", help="a little of everything, on a tiny model unless --model")
    parser.add_argument("--profile", metavar="LOAD", help="print where the time of a load goes, such as mixed8_16")
    parser.add_argument("--json", type=Path, help="where to keep every repeat")
    parser.add_argument("--quality-model", type=Path, help="root of a trained system")
    parser.add_argument("--quality-data", type=Path, help="Parquet files with its test rows; what it was trained on")
    parser.add_argument("--peers", action="store_true", help="time other systems too")
    parser.add_argument("--peers-dir", type=Path, default=CHECKOUT.parent / "shared" / "peers", help="their scripts")
    parser.add_argument("--vllm-python", type=Path, help="Python of vLLM's own environment; without it, no vLLM")
    return parser


def _run(options: argparse.Namespace, errors: Console) -> None:
    check_options(options, positive=("adapters", "threads", "rounds"), files=("json",))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("--device is cuda, and torch sees no GPU here; leave it out to measure on the CPU.")
    names = _chosen(options, errors)
    torch.set_num_threads(options.threads)
    with _model(options, errors) as model:
        model.check(max(options.adapters, *(SCENARIOS[name].num_adapters for name in names)))
        bench = Bench(
            model=model,
            num_adapters=options.adapters,
            effort=_effort(options),
            bandwidth=read_bandwidth(model.device),
            console=errors,
            peers=_peers(options, errors) if "peers" in names else None,
            quality=_quality(options) if "quality" in names else None,
        )
        errors.print(machine_words(bench), highlight=False)
        if options.profile is not None:
            print_profile(bench, options.profile)
            return
        figures: Measurements = {}
        with bench.progress:
            for name in names:
                measured = SCENARIOS[name].measure(bench)
                figures |= measured
                errors.print(f"{name}: {in_words(measured)}", highlight=False)
                if options.json is not None:
                    write_json(options.json, figures, bench)
        print_table(figures, bench)
        print(result_line(figures), flush=True)


def _chosen(options: argparse.Namespace, errors: Console) -> list[str]:
    """The scenarios to run: those named, or all, less what is not there to be run."""
    on_cpu = options.device == "cpu"
    has_proc = Path("/proc/self/statm").exists()
    lacking = {
        "peers": "--peers" if not options.peers else None if on_cpu else "--device cpu, where the peers run",
        "quality": None if options.quality_model else "--quality-model ROOT",
        "quantized": None if on_cpu and has_proc else "a CPU, and Linux, whose /proc tells the memory in use",
    }
    chosen = []
    for name in options.only or SCENARIOS:
        if (option := lacking.get(name)) is None:
            chosen.append(name)
        elif options.only:
            raise InvalidInput(f"The scenario {name!r} needs {option}; give it, or leave the scenario out.")
        else:
            errors.print(f"without {option}: the figures of {name!r} are left out", markup=False)
    return chosen


@contextmanager
def _model(options: argparse.Namespace, errors: Console) -> Iterator[TimedModel]:
    """The model that was named; for --quick without one, a tiny one, removed in the end."""
    if options.model is not None:
        yield TimedModel(options.model.resolve(), options.device)
        return
    if not options.quick:
        raise InvalidInput(
            "There is no --model; write one with `python -m benchmarks.random_model OUT`, or give --quick, which makes "
            "a tiny one."
        )
    errors.print("writing a tiny random model ...")
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), SHAPES["tiny"], max(MANY, options.adapters))
        yield TimedModel(Path(folder), options.device)


def _effort(options: argparse.Namespace) -> Effort:
    effort = QUICK if options.quick else Effort()
    return effort if options.rounds is None else replace(effort, rounds=options.rounds)


def _peers(options: argparse.Namespace, errors: Console) -> Peers:
    python = options.vllm_python
    # Not resolved: the link itself is what makes it the environment's interpreter.
    peers = Peers(options.peers_dir.resolve(), None if python is None else python.absolute())
    check_peers(peers)
    if python is None:
        errors.print("without --vllm-python PATH: the figures of vLLM are left out", markup=False)
    return peers


def _quality(options: argparse.Namespace) -> Quality:
    root = options.quality_model.resolve()
    data = options.quality_data.resolve() if options.quality_data is not None else data_of(root)
    if data is None:
        raise InvalidInput(f"{root} does not say what it was trained on; name that folder by --quality-data.")
    if (version := Catalog(root).load().base) is None:
        raise InvalidInput(f"--quality-model is {root}, which holds no base; expected the root of a trained system.")
    return Quality(root / "base" / str(version), data)


if __name__ == "__main__":
    main()
