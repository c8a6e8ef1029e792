"""The router's figures: tiny ada beside the linear n-gram router, on public data, and how long a prompt takes.

Everything is measured on official validation splits, from which nothing is chosen; official test splits are not read.
A figure is the mean over trainings with different seeds. Run it on an idle machine: what else runs is measured too.
"""

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.command import check_options, ended_well, scenario_parser, terminal
from benchmarks.figures import Measurements
from benchmarks.report import result_line
from benchmarks.router_bench import KINDS, QUICK, Effort, RouterBench
from benchmarks.router_curve import measure_curve, plot_curve, print_curve
from benchmarks.router_data import SOURCES, files_of
from benchmarks.router_latency import latency
from benchmarks.router_quality import accuracy_on, clinc, fewshot, near
from benchmarks.router_report import bars, for_result, in_words, print_table, write_json
from benchmarks.router_sentences import RememberingModel, installed_encoder
from cluster.config.places import CHECKOUT
from cluster.errors import InvalidInput
from cluster.router.sentence_model import PACKAGE, SentenceModel, find_sentence_model

QUICK_BASE_PARAMETERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that is run for the figures it gives."""

    measure: Callable[[RouterBench], Measurements]
    what: str
    data: str = "clinc"
    """The set of `SOURCES` that it needs."""


SCENARIOS = {
    "clinc": Scenario(clinc, "CLINC150, 10 domains: accuracy, out of scope, calibration, training"),
    "near": Scenario(near, "one intent of every CLINC150 domain left out: near out of scope"),
    "fewshot": Scenario(fewshot, "each CLINC150 domain left out, then added from 5 examples per intent"),
    "banking": Scenario(accuracy_on("banking"), "BANKING77, 77 intents as domains", "banking"),
    "hwu": Scenario(accuracy_on("hwu"), "HWU64, 18 scenarios", "hwu"),
    "mmlu": Scenario(accuracy_on("mmlu"), "MMLU questions, 57 subjects", "mmlu"),
    "domains": Scenario(accuracy_on("domains"), "13 domains of prompts, template words taken out", "domains"),
    "manytask": Scenario(accuracy_on("manytask"), "275 small tasks", "manytask"),
    "latency": Scenario(latency, "one prompt on one core: 10, 1,000 and 10,000 domains, and a long prompt"),
}


def main(arguments: list[str] | None = None) -> None:
    """The command. An error of the user's making ends it with a sentence and exit status 1."""
    options = _parser().parse_args(arguments)
    # Tables and the line RESULT go to standard output, everything else to standard error.
    errors = Console(stderr=True)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in stage 3: products so small that a second thread only waits for the first
    try:
        with ended_well(errors):
            _run(options, errors)
    finally:
        torch.set_num_threads(num_threads)


def _parser() -> argparse.ArgumentParser:
    parser = scenario_parser("router", __doc__, SCENARIOS)
    data = CHECKOUT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=data, help="folder of the data sets, each in its own folder")
    parser.add_argument(
        "--seeds",
        type=int,
        help=f"trainings that each figure is the mean of ({Effort().seeds}; {Effort().fewer_seeds} of what takes long)",
    )
    parser.add_argument(
        "--base-parameters",
        type=int,
        help="of the base to be served, whose twenty-fifth the router may have (100,000,000)",
    )
    parser.add_argument(
        "--pretrained",
        metavar="NAME",
        default=installed_encoder(),
        help="folder or package of a sentence encoder, for rows of their own; none leaves them out "
        f"({PACKAGE} where it is installed)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="rows: tiny ada from scratch, taught by the sentence encoder, with it beside the n-grams (all)",
    )
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it works")
    parser.add_argument(
        "--curve",
        type=Path,
        nargs="?",
        const=Path("router_curve.png"),
        metavar="PNG",
        help="instead of the scenarios: CLINC150 by size of the router, drawn too where matplotlib is installed",
    )
    parser.add_argument("--json", type=Path, help="where to keep every repeat")
    return parser


def _run(options: argparse.Namespace, errors: Console) -> None:
    check_options(options, positive=("seeds", "base_parameters"), files=("json", "curve"))
    base_parameters = options.base_parameters or (QUICK_BASE_PARAMETERS if options.quick else 100_000_000)
    sentences = _sentences(options.pretrained)
    kinds = [prefix for kind, prefix in KINDS.items() if kind in options.kinds]
    bench = RouterBench(options.data.resolve(), _effort(options), base_parameters, errors, sentences, kinds)
    if options.curve is not None:
        _draw(bench, options.curve, errors)
        return
    figures: Measurements = {}
    names = _chosen(options, bench.folder, errors)
    with bench.progress:
        for name in names:
            measured = SCENARIOS[name].measure(bench)
            figures |= measured
            errors.print(f"{name}: {in_words(measured)}", highlight=False)
            if options.json is not None:
                write_json(options.json, figures, _about(bench))
    title = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in _about(bench).items())
    print_table(figures, bars(figures, bench.effort.settings.target_false_rejection), title)
    print(result_line(for_result(figures)), flush=True)


def _chosen(options: argparse.Namespace, folder: Path, errors: Console) -> list[str]:
    """The scenarios to run: those named, or all whose data is there."""
    if options.only:
        return [name for name in SCENARIOS if name in options.only]
    lacking = sorted(name for name in SOURCES if not files_of(name, folder))
    for name in lacking:
        errors.print(f"without {SOURCES[name].files} in --data: what needs it is left out", markup=False)
    names = [name for name, scenario in SCENARIOS.items() if scenario.data not in lacking]
    if not names:
        raise InvalidInput(f"There is no data set in {folder}; name the folder of the data with --data.")
    return names


def _sentences(name: str | None) -> RememberingModel | None:
    if name in (None, "none"):
        return None
    return RememberingModel(SentenceModel.load(find_sentence_model(name)))


def _effort(options: argparse.Namespace) -> Effort:
    effort = QUICK if options.quick else Effort()
    return effort if options.seeds is None else replace(effort, seeds=options.seeds, fewer_seeds=options.seeds)


def _about(bench: RouterBench) -> dict[str, object]:
    """What the figures were measured with."""
    return {
        "base_parameters": f"{bench.num_base_parameters:,}",
        "steps": bench.effort.settings.steps,
        "pretrained": "none" if bench.sentences is None else f"{bench.sentences.num_parameters:,}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _draw(bench: RouterBench, file: Path, errors: Console) -> None:
    with bench.progress:
        points = measure_curve(bench)
    print_curve(points, terminal())
    if plot_curve(points, file):
        errors.print(f"drawn in {file}", markup=False)
    else:
        errors.print("without matplotlib: the curve is not drawn")


if __name__ == "__main__":
    main()
