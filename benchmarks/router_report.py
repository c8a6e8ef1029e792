"""The router's figures beside the baseline's: on the terminal, in a file, and which of them RESULT names."""

import json
from pathlib import Path

from rich.table import Table

from benchmarks.command import terminal
from benchmarks.figures import Bar, Measurement, Measurements
from benchmarks.router_bench import BASELINE, PRETRAINED, TAUGHT

QUALITY = (
    "clinc_accuracy",
    "clinc_oos_auroc",
    "clinc_oos_fpr95",
    "clinc_ece",
    "fewshot5_recall",
    "fewshot5_old_loss",
    "banking_accuracy",
    "hwu_accuracy",
    "mmlu_accuracy",
    "domains_accuracy",
    "manytask_accuracy",
)
COST = ("p50_ms_10", "p50_ms_1000", "p50_ms_10000", "p99_ms_long", "train_s", "parameters")

_ROWS = {TAUGHT: "taught by an encoder", PRETRAINED: "pretrained encoder"}

PRETRAINED_NAMES = tuple(kind + name for kind in _ROWS for name in (*QUALITY, *COST))

RESULT_NAMES = (*QUALITY, *(BASELINE + name for name in QUALITY), *COST, *PRETRAINED_NAMES)
"""What RESULT holds, the last of it where there is a pretrained encoder. The table holds more: other scores, other
shares, and how far the seeds lie apart."""

_BARS = {
    "clinc_accuracy": Bar(0.983),
    "clinc_oos_auroc": Bar(0.965),
    "clinc_oos_fpr95": Bar(0.16, at_most=True),
    "clinc_ece": Bar(0.010, at_most=True),
    "fewshot5_recall": Bar(0.90),
    "fewshot5_old_loss": Bar(0.2, at_most=True),
    "banking_accuracy": Bar(0.93),
    "p50_ms_10": Bar(1.0, at_most=True),
    "p50_ms_1000": Bar(1.5, at_most=True),
    "p50_ms_10000": Bar(3.0, at_most=True),
    "p99_ms_long": Bar(10.0, at_most=True),
    "train_s": Bar(600.0, at_most=True),
}
_AHEAD_OF_BASELINE = ("clinc_near_auroc", "hwu_accuracy", "mmlu_accuracy", "domains_accuracy", "manytask_accuracy")


def bars(figures: Measurements, target_false_rejection: float) -> dict[str, Bar]:
    """The bar of each figure that has one; for some it is what the baseline reached."""
    found = {**_BARS, "clinc_false_rejection": Bar(target_false_rejection, at_most=True)}
    for name in _AHEAD_OF_BASELINE:
        if (baseline := figures.get(BASELINE + name)) is not None:
            found[name] = Bar(float(f"{baseline.value:.4g}"))
    return found


def for_result(figures: Measurements) -> Measurements:
    """Those of the figures that RESULT names, in its order."""
    return {name: figures[name] for name in RESULT_NAMES if name in figures}


def print_table(figures: Measurements, set_bars: dict[str, Bar], title: str) -> None:
    """Each figure over its repeats, the baseline's beside it, its bar, and rows below with a pretrained encoder."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure", no_wrap=True)
    for column in ("tiny ada", "least", "most", "of", "baseline", "least", "most", "bar", ""):
        table.add_column(column, justify="right", no_wrap=True)
    names = dict.fromkeys(_plain(name) for name in figures)
    for name in names:
        ours, bar = figures.get(name), set_bars.get(name)
        table.add_row(name, *_cells(ours), _number(ours), *_cells(figures.get(BASELINE + name)), *_verdict(ours, bar))
        for kind, row in _ROWS.items():
            if (helped := figures.get(kind + name)) is not None:
                table.add_row(f"  {row}", *_cells(helped), _number(helped), *_cells(None), *_verdict(helped, bar))
    terminal().print(table)


def in_words(figures: Measurements) -> str:
    """The figures alone, on one line."""
    return ", ".join(f"{name} {_short(measurement.value)}" for name, measurement in figures.items())


def write_json(path: Path, figures: Measurements, about: dict[str, object]) -> None:
    """Every repeat of every figure, and what it was measured with."""
    values = {name: {"value": m.value, "repeats": list(m.repeats)} for name, m in figures.items()}
    path.write_text(json.dumps({**about, "figures": values}, indent=2))


def _plain(name: str) -> str:
    for prefix in (BASELINE, *_ROWS):
        name = name.removeprefix(prefix)
    return name


def _number(measurement: Measurement | None) -> str:
    return "" if measurement is None else str(len(measurement.repeats))


def _verdict(measurement: Measurement | None, bar: Bar | None) -> tuple[str, str]:
    if measurement is None or bar is None:
        return "", ""
    return str(bar), "[green]yes[/]" if measurement.reaches(bar) else "[red]no[/]"


def _cells(measurement: Measurement | None) -> tuple[str, str, str]:
    if measurement is None:
        return "", "", ""
    # What was measured once has no spread.
    spread = (min(measurement.repeats), max(measurement.repeats)) if len(measurement.repeats) > 1 else ()
    least, most = (_short(value) for value in spread) if spread else ("", "")
    return _short(measurement.value), least, most


def _short(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"
