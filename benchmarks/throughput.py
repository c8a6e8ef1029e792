"""Tokens per second: the base alone, adapters in turn, many adapters or one, mixtures or single ones, adapters idle."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from benchmarks.bench import Bench
from benchmarks.figures import (
    CONCURRENCY,
    Measurement,
    Measurements,
    mixed_name,
    paired_ratios,
    share_allowed,
)
from benchmarks.system import Size, System, domain, in_turn, plain, read_bandwidth
from benchmarks.workload import MixtureOf

MANY = 16
"""Requests, and distinct adapters, of the loads that share or do not share them."""

_BANDWIDTH = "bandwidth"


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests at once, each with the mixture of its number."""

    num_requests: int
    mixture_of: MixtureOf

    def tokens_per_s(self, system: System) -> float:
        """Play it once."""
        return system.play(self.num_requests, self.mixture_of).tokens_per_s


def loads(num_adapters: int) -> dict[str, Load]:
    """Every load, by name."""
    named = {}
    for n in CONCURRENCY:
        named[f"base_{n}"] = Load(n, plain)
        named[mixed_name(num_adapters, n)] = Load(n, in_turn(num_adapters))
    named["same16"] = Load(MANY, in_turn(1))
    named["distinct16"] = Load(MANY, in_turn(MANY))
    named["mix3"] = Load(MANY, in_turn(num_adapters, num_mixed=3))
    return named


def _runs(bench: Bench, system: System, named: dict[str, Load]) -> dict[str, Callable[[], float]]:
    """The loads, and in each round what memory gives: on a shared machine it changes from minute to minute."""
    runs: dict[str, Callable[[], float]] = {name: partial(load.tokens_per_s, system) for name, load in named.items()}
    return runs | {_BANDWIDTH: partial(read_bandwidth, bench.model.device)}


def _bound(num_requests: int, rates: Sequence[float], extra_bytes: int, bandwidths: Sequence[float]) -> float:
    """The share of `rates` (tokens/s) that steps keep which must read so many more bytes: the median of the rounds."""
    return median(
        share_allowed(num_requests / rate, extra_bytes, bandwidth)
        for rate, bandwidth in zip(rates, bandwidths, strict=True)
    )


def serving(bench: Bench) -> Measurements:
    """The base alone and adapters in turn, at each concurrency."""
    names = [name for n in CONCURRENCY for name in (f"base_{n}", mixed_name(bench.num_adapters, n))]
    with bench.opened(Size(bench.num_adapters)) as system:
        named = {name: load for name, load in loads(bench.num_adapters).items() if name in names}
        rates = bench.interleaved("base and adapters", _runs(bench, system, named), bench.effort.rounds)
    figures = {name: Measurement(rates[name]) for name in names}
    for n in CONCURRENCY:
        mixed = mixed_name(bench.num_adapters, n)
        extra_bytes = min(n, bench.num_adapters) * bench.model.adapter_bytes()
        bound = _bound(n, rates[f"base_{n}"], extra_bytes, rates[_BANDWIDTH])
        figures[f"{mixed}_over_base"] = Measurement(paired_ratios(rates[mixed], rates[f"base_{n}"]), bound)
    return figures


def sharing(bench: Bench) -> Measurements:
    """16 requests: distinct adapters against one adapter, and mixtures of 3 against single adapters.

    The mixtures are of the same adapters as the single ones, so that both must read the same bytes.
    """
    single = mixed_name(bench.num_adapters, MANY)
    named = {name: loads(bench.num_adapters)[name] for name in ("same16", "distinct16", single, "mix3")}
    with bench.opened(Size(max(MANY, bench.num_adapters))) as system:
        rates = bench.interleaved("shared adapters and mixtures", _runs(bench, system, named), bench.effort.rounds)
    bound = _bound(MANY, rates["same16"], (MANY - 1) * bench.model.adapter_bytes(), rates[_BANDWIDTH])
    return {
        "distinct16_over_same16": Measurement(paired_ratios(rates["distinct16"], rates["same16"]), bound),
        "mix3_over_single": Measurement(paired_ratios(rates["mix3"], rates[single]), bound=1.0),
    }


def idle_adapters(bench: Bench) -> Measurements:
    """Requests to the base alone on an engine that holds adapters against one that holds none.

    The two take steps in turn, so that whatever slows the machine slows both. Two engines with equal work can still
    differ by how their memory happens to lie: both are measured before either holds an adapter, too, and the ratio
    then is divided out.
    """
    with bench.opened(Size(bench.num_adapters)) as with_adapters, bench.opened(Size(bench.num_adapters)) as without:
        run = {"steps in turn": partial(_speed_of_first_over_second, with_adapters, without)}
        before = bench.interleaved("two engines, no adapters yet", run, bench.effort.rounds)
        with_adapters.client.register([domain(i) for i in range(bench.num_adapters)])
        after = bench.interleaved("one of them with adapters, idle", run, bench.effort.rounds)
    unequal = Measurement(before["steps in turn"]).value
    return {"idle_adapters_over_none": Measurement(tuple(ratio / unequal for ratio in after["steps in turn"]))}


def _speed_of_first_over_second(first: System, second: System) -> float:
    """The same load on both, a step of one and a step of the other: the median ratio of the pairs' times."""
    systems = (first, second)
    for system in systems:
        for request in system.workload.requests(MANY, plain):
            system.engine.submit(request)
    ratios: list[float] = []
    while first.engine.has_work:
        times_s = [0.0, 0.0]
        # Who goes second finds the machine as the other has left it.
        for place in (0, 1) if len(ratios) % 2 else (1, 0):
            since_s = time.perf_counter()
            systems[place].engine.step()
            times_s[place] = time.perf_counter() - since_s
        ratios.append(times_s[1] / times_s[0])
    assert not second.engine.has_work, "equal work ended after different numbers of steps"
    return median(ratios)
