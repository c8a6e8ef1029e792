"""The figures that are measured, the bars set for them, and how repeats become one number.

A ratio is taken per pair of runs that followed one another, and the median of the pairs' ratios counts: a machine that
slows down for a while slows both.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

CONCURRENCY = (1, 8, 16)
"""Requests at once."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure should reach."""

    value: float
    at_most: bool = False
    """The figure must not exceed the bar; otherwise it must not fall below it."""
    of_bound: bool = False
    """The bar is a share of the figure's own physical bound."""

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g}{' of bound' if self.of_bound else ''}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """The repeats of one figure."""

    repeats: tuple[float, ...]
    bound: float | None = None
    """What the bytes that must be read allow at the bandwidth measured beside; None where that says nothing."""

    @property
    def value(self) -> float:
        return median(self.repeats)

    def reaches(self, bar: Bar) -> bool:
        """Whether the value reaches `bar`."""
        value = self.value
        if bar.of_bound:
            assert self.bound is not None, "a bar that is a share of a bound needs the bound"
            value /= self.bound
        return value <= bar.value if bar.at_most else value >= bar.value


@dataclass(frozen=True, slots=True)
class SeedMeasurement(Measurement):
    """The repeats of a figure that differ by their seed and not by the machine's mood: their mean counts."""

    @property
    def value(self) -> float:
        return fmean(self.repeats)


Measurements = dict[str, Measurement]


def bars(num_adapters: int) -> dict[str, Bar]:
    """The bars, by figure."""
    mixed = mixed_name(num_adapters, 16)
    return {
        "base_1_over_vllm": Bar(0.95),
        "base_8_over_vllm": Bar(1.2),
        "base_16_over_vllm": Bar(1.2),
        f"{mixed}_over_vllm": Bar(5.0),
        f"{mixed}_over_peft": Bar(2.7),
        f"{mixed}_over_base": Bar(0.75),
        "distinct16_over_same16": Bar(0.95, of_bound=True),
        "mix3_over_single": Bar(0.90, of_bound=True),
        "idle_adapters_over_none": Bar(0.99),
        "cliff_throughput": Bar(0.7),
        "cliff_ttft": Bar(2.0, at_most=True),
        "cliff_crowded_throughput": Bar(0.7),
        "ttft_p99_over_p50": Bar(3.0, at_most=True),
        "int8_over_bf16_1": Bar(1.6),
        "int4_over_bf16_1": Bar(2.3),
        "int8_memory": Bar(0.55, at_most=True),
        "int8_ppl_rise": Bar(0.005, at_most=True),
        "int4_ppl_rise": Bar(0.04, at_most=True),
    }


def mixed_name(num_adapters: int, num_requests: int) -> str:
    """The figure of `num_requests` requests that take `num_adapters` adapters in turn."""
    return f"mixed{num_adapters}_{num_requests}"


def interleaved(
    runs: Mapping[str, Callable[[], float]], rounds: int, done: Callable[[str], None]
) -> dict[str, tuple[float, ...]]:
    """What each run gave in each round. A round goes through all runs, every second one backwards, so that what
    drifts favours none. `done` is told the name of each run that has ended.
    """
    results: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            results[name].append(runs[name]())
            done(name)
    return {name: tuple(values) for name, values in results.items()}


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, ...]:
    """The ratio of each round's two runs."""
    return tuple(a / b for a, b in zip(numerators, denominators, strict=True))


def share_allowed(step_s: float, extra_bytes: float, bandwidth: float) -> float:
    """The share of its speed that a step of `step_s` keeps when it must read so many more bytes."""
    return step_s / (step_s + extra_bytes / bandwidth)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
