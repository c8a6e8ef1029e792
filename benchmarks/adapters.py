"""The adapter plane's figures: what it takes to keep, move and merge many adapters.

Run it on an idle machine: what else runs is measured too.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.adapters_publishing import publish
from benchmarks.adapters_serving import SERVING_SCENARIOS, ServingBench
from benchmarks.catalog_size import catalog_size
from benchmarks.command import check_options, ended_well, quiet_progress, scenario_parser, terminal
from benchmarks.figures import Bar, Measurements
from benchmarks.killed_publisher import torn
from benchmarks.merging import FULL, QUICK, merging
from benchmarks.report import in_words, result_line
from benchmarks.system import num_cores

_DIGITS = 9
"""Of the figures in RESULT: some bars lie within a hundred thousandth of 1."""

_KILLS, _KILLS_QUICK = 500, 20


@dataclass(frozen=True, slots=True)
class AdapterBench:
    """What a scenario is given."""

    is_quick: bool
    most_blocks: int | None
    """Of a model, whose blocks are all alike; all by default."""
    tables: Console
    progress: Progress
    serving: ServingBench
    """What the scenarios on a cluster are given."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that is run for the figures it gives."""

    measure: Callable[[AdapterBench], Measurements]
    what: str


def _merging(bench: AdapterBench) -> Measurements:
    mixings = tuple(
        replace(mixing, num_blocks=min(mixing.num_blocks, bench.most_blocks or mixing.num_blocks))
        for mixing in (QUICK if bench.is_quick else FULL)
    )
    task = bench.progress.add_task("merging", total=None)
    return merging(mixings, bench.tables, lambda _: bench.progress.update(task, advance=1, refresh=True))


def _catalog(bench: AdapterBench) -> Measurements:
    return catalog_size(bench.serving.effort.many)


def _torn(bench: AdapterBench) -> Measurements:
    return torn(_KILLS_QUICK if bench.is_quick else _KILLS)


def _on_cluster(measure: Callable[[ServingBench], Measurements]) -> Callable[[AdapterBench], Measurements]:
    return lambda bench: measure(bench.serving)


SCENARIOS = {
    "merging": Scenario(
        _merging, "mixtures of up to 1,000 adapters, merged on 1, 2, 4 and 8 shards, against the optimum"
    ),
    "catalog": Scenario(_catalog, "10,000 domains in the catalog and in the router; one more"),
    # Before Ray is started: what is forked should have no threads of others.
    "torn": Scenario(_torn, "publishers killed at each of their steps"),
    **{name: Scenario(_on_cluster(measure), what) for name, (measure, what) in SERVING_SCENARIOS.items()},
    "publish": Scenario(_on_cluster(publish), "domains published and withdrawn under load, on two replicas"),
}

BARS = {
    "merge_exact_over_optimum": Bar(1 + 1e-5, at_most=True),
    "merge_random_over_optimum": Bar(1.01, at_most=True),
    "certificate_violations": Bar(0, at_most=True),
    "published10000_over_64": Bar(0.95),
    "cold_over_warm_p99": Bar(2, at_most=True),
    "others_tpot_p99_ratio": Bar(1.2, at_most=True),
    "fanout4_p50_ms": Bar(6, at_most=True),
    "failed_on_shard_kill": Bar(0, at_most=True),
    "failed_on_other_shards": Bar(0, at_most=True),
    "shard_recovery_s": Bar(3, at_most=True),
    "publish_to_live_s": Bar(1, at_most=True),
    "publish_to_live_worst_s": Bar(1, at_most=True),
    "failed_during_publish": Bar(0, at_most=True),
    "lost_publishes": Bar(0, at_most=True),
    "torn_catalogs": Bar(0, at_most=True),
    "catalog_load_s": Bar(2, at_most=True),
}


def main(arguments: list[str] | None = None) -> None:
    """The command. An error of the user's making ends it with a sentence and exit status 1."""
    options = _parser().parse_args(arguments)
    # Tables and the line RESULT go to standard output, everything else to standard error.
    errors = Console(stderr=True)
    num_threads = torch.get_num_threads()
    try:
        with ended_well(errors):
            _run(options, errors)
    finally:
        torch.set_num_threads(num_threads)


def _parser() -> argparse.ArgumentParser:
    parser = scenario_parser("adapters", __doc__, SCENARIOS)
    parser.add_argument("--threads", type=int, default=num_cores(), help="of the products; all cores by default")
    parser.add_argument("--blocks", type=int, help="merge so many of the model's blocks, which are all alike")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it works")
    parser.add_argument("--roots", type=Path, help="where roots to be served are kept for the next time")
    parser.add_argument("--json", type=Path, help="where to keep every repeat")
    return parser


def _run(options: argparse.Namespace, errors: Console) -> None:
    check_options(options, positive=("threads", "blocks"), files=("json",))
    torch.set_num_threads(options.threads)
    progress = quiet_progress(errors)
    figures: Measurements = {}
    with progress, tempfile.TemporaryDirectory() as temporary:
        serving = ServingBench(options.roots or Path(temporary), options.quick, errors)
        bench = AdapterBench(options.quick, options.blocks, terminal(), progress, serving)
        for name in [name for name in SCENARIOS if name in (options.only or SCENARIOS)]:
            measured = SCENARIOS[name].measure(bench)
            figures |= measured
            errors.print(f"{name}: {in_words(measured)}", highlight=False)
            if options.json is not None:
                values = {name: {"value": m.value, "repeats": list(m.repeats)} for name, m in figures.items()}
                options.json.write_text(json.dumps({"torch": torch.__version__, "figures": values}, indent=2))
    for name, bar in BARS.items():
        if name in figures:
            verdict = "yes" if figures[name].reaches(bar) else "no"
            bench.tables.print(f"{name} {figures[name].value:.{_DIGITS}g}, bar {bar}: {verdict}", highlight=False)
    print(result_line(figures, _DIGITS), flush=True)


if __name__ == "__main__":
    main()
