"""Quality against size: tiny ada for bases of several sizes, on CLINC150, as a table and where possible a picture."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.figures import SeedMeasurement
from benchmarks.router_bench import KINDS, PRETRAINED, PRETRAINED_BASE_PARAMETERS, RouterBench, Tally
from benchmarks.router_data import split_off_calibration
from benchmarks.router_metrics import auroc
from benchmarks.router_quality import judge


@dataclass(frozen=True, slots=True)
class Point:
    """A size and what it gives."""

    num_base_parameters: int
    num_parameters: int
    kind: str
    """One of `KINDS`."""
    accuracy: SeedMeasurement
    auroc: SeedMeasurement
    train_s: SeedMeasurement


def measure_curve(bench: RouterBench) -> list[Point]:
    """Accuracy and out-of-scope AUROC of each size and kind, like the scenario `clinc`."""
    data = bench.data("clinc")
    of_ngrams = [kind for kind in KINDS if KINDS[kind] in bench.kinds and KINDS[kind] != PRETRAINED]
    sizes = [(size, kind) for kind in of_ngrams for size in bench.effort.curve_base_parameters]
    sizes += [(PRETRAINED_BASE_PARAMETERS, "pretrained")] if PRETRAINED in bench.kinds else []
    task = bench.task("curve", len(sizes) * bench.effort.fewer_seeds)
    points = []
    for size, kind in sizes:
        tally, num_parameters = Tally(), 0
        for seed in range(bench.effort.fewer_seeds):
            trained = bench.train(*split_off_calibration(data.train, seed), seed, KINDS[kind], size)
            num_parameters = trained.ada.num_parameters
            judged, outside = judge(trained.ada, data.val.texts), judge(trained.ada, data.outside)
            tally.add({"accuracy": judged.accuracy(data.val.domains), "train_s": trained.train_s})
            tally.add({"auroc": auroc(judged.inside_B, outside.inside_B)})
            task.done()
        measured = {name: SeedMeasurement(figure.repeats) for name, figure in tally.measurements().items()}
        points.append(Point(size, num_parameters, kind, **measured))
    return points


def print_curve(points: list[Point], console: Console) -> None:
    """A row per size: the mean over seeds, and in brackets the least and the most."""
    table = Table(title="CLINC150 by size of the router", title_justify="left")
    for name in ("base", "", "parameters", "accuracy", "out-of-scope AUROC", "training, s"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            f"{point.num_base_parameters / 1e6:g}M",
            point.kind,
            f"{point.num_parameters:,}",
            _spread(point.accuracy, 4),
            _spread(point.auroc, 4),
            _spread(point.train_s, 1),
        )
    console.print(table)


def plot_curve(points: list[Point], file: Path) -> bool:
    """Draw the curve into `file`; false where matplotlib, which nothing here depends on, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    importlib.import_module("matplotlib").use("Agg")
    figure, axes = importlib.import_module("matplotlib.pyplot").subplots()
    for kind, marker in zip(KINDS, "os*", strict=True):
        drawn = [point for point in points if point.kind == kind]
        sizes = [point.num_parameters for point in drawn]
        axes.semilogx(sizes, [point.accuracy.value for point in drawn], marker=marker, label=f"accuracy, {kind}")
        axes.semilogx(sizes, [point.auroc.value for point in drawn], marker=marker, label=f"out-of-scope AUROC, {kind}")
    axes.set_xlabel("parameters of tiny ada")
    axes.set_title("CLINC150, 10 domains, validation split")
    axes.legend()
    figure.savefig(file, dpi=150)
    return True


def _spread(figure: SeedMeasurement, digits: int) -> str:
    least, most = min(figure.repeats), max(figure.repeats)
    return f"{figure.value:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"
