"""The figures on the terminal, in a file, and as the one line that a program reads."""

import json
import math
import platform
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.bench import Bench
from benchmarks.command import terminal
from benchmarks.figures import Bar, Measurement, Measurements, bars


def print_table(figures: Measurements, bench: Bench) -> None:
    """Each figure with its spread, its bound and its bar, on standard output."""
    table = Table(title=machine_words(bench), title_justify="left")
    table.add_column("figure", no_wrap=True)
    for name in ("measured", "least", "most", "bound", "of bound", "bar", ""):
        table.add_column(name, justify="right", no_wrap=True)
    set_bars = bars(bench.num_adapters)
    for name, measurement in figures.items():
        table.add_row(name, *_cells(measurement), *_verdict(measurement, set_bars.get(name)))
    terminal().print(table)


def in_words(figures: Measurements) -> str:
    """The figures alone, on one line."""
    return ", ".join(f"{name} {_short(measurement.value)}" for name, measurement in figures.items())


def _cells(measurement: Measurement) -> tuple[str, ...]:
    bound = measurement.bound
    return (
        _short(measurement.value),
        _short(min(measurement.repeats)),
        _short(max(measurement.repeats)),
        "" if bound is None else _short(bound),
        "" if bound is None else f"{measurement.value / bound:.0%}",
    )


def _verdict(measurement: Measurement, bar: Bar | None) -> tuple[str, str]:
    if bar is None:
        return "", ""
    return str(bar), "[green]yes[/]" if measurement.reaches(bar) else "[red]no[/]"


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def machine_words(bench: Bench) -> str:
    """What the figures were measured on."""
    device = f"{torch.get_num_threads()} threads" if bench.model.device == "cpu" else torch.cuda.get_device_name()
    return (
        f"{bench.model.folder}, {bench.num_adapters} adapters, {device}, "
        f"{bench.bandwidth / 1e9:.1f} GB/s, torch {torch.__version__}, {platform.machine()}"
    )


def result_line(figures: Measurements, digits: int = 4) -> str:
    """`RESULT {json}`: every figure, and `<figure>_bound` where there is one, to so many digits."""
    numbers = {}
    for name, measurement in figures.items():
        numbers[name] = measurement.value
        if measurement.bound is not None:
            numbers[f"{name}_bound"] = measurement.bound
    assert all(math.isfinite(number) for number in numbers.values()), f"a figure is not a number: {numbers}"
    return "RESULT " + json.dumps({name: float(f"{number:.{digits}g}") for name, number in numbers.items()})


def write_json(path: Path, figures: Measurements, bench: Bench) -> None:
    """Every repeat of every figure."""
    content = {
        "model": str(bench.model.folder),
        "num_adapters": bench.num_adapters,
        "threads": torch.get_num_threads(),
        "bandwidth_bytes_per_s": bench.bandwidth,
        "torch": torch.__version__,
        "figures": {
            name: {"value": m.value, "repeats": list(m.repeats), "bound": m.bound} for name, m in figures.items()
        },
    }
    path.write_text(json.dumps(content, indent=2))
