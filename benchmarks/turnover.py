"""More domains than the slot bank holds: adapters come and go while others decode.

The cliffs: a working set of twice the bank against a bank that holds all of it. Hot and cold: what the time to the
first token is when half of all requests go to one domain and the others to fifty.
"""

import math
import random
from collections.abc import Callable
from functools import partial

from benchmarks.bench import Bench
from benchmarks.client import Played
from benchmarks.figures import Measurement, Measurements, paired_ratios, percentile
from benchmarks.system import MAX_BATCH_SIZE, Size, System, domain, in_turn
from benchmarks.workload import MixtureOf
from cluster.messages import Mixture

WORKING_SET = 16
"""Domains in turn; the small bank holds half of them."""
COLD_DOMAINS = 50
HOT_AND_COLD_SLOTS = 16
LOAD_SHARE = 0.6
"""Requests arrive at this share of the rate that a closed loop gets through."""


def cliff(bench: Bench) -> Measurements:
    """As many requests in flight as the small bank has slots: all can run, but most wait for their adapter first."""
    throughput, ttft = _half_over_whole(bench, "half of the adapters fit", in_flight=WORKING_SET // 2)
    return {"cliff_throughput": throughput, "cliff_ttft": ttft}


def crowded_cliff(bench: Bench) -> Measurements:
    """Twice as many requests in flight as slots, each for another domain: half of them must wait for others to end.

    By Little's law, with 16 in flight and 8 running, that wait is half of the whole time to the last token.
    """
    throughput, ttft = _half_over_whole(bench, "half fit, twice as many in flight", in_flight=WORKING_SET)
    return {"cliff_crowded_throughput": throughput, "cliff_crowded_ttft": ttft}


def _half_over_whole(bench: Bench, what: str, in_flight: int) -> tuple[Measurement, Measurement]:
    """A bank of half the working set over one of the whole: throughput, and median time to the first token."""
    num_requests, rounds = bench.effort.turnover_requests, bench.effort.turnover_rounds
    with bench.opened(Size(WORKING_SET // 2, WORKING_SET)) as half, bench.opened(Size(WORKING_SET)) as whole:
        ttfts_s: dict[str, list[float]] = {"half": [], "whole": []}

        def run(name: str, system: System) -> float:
            window = _closed_loop(system, num_requests, in_turn(WORKING_SET), in_flight)
            ttfts_s[name].append(window.ttft_p50_s)
            return window.tokens_per_s

        rates = bench.interleaved(
            what, {"half": partial(run, "half", half), "whole": partial(run, "whole", whole)}, rounds
        )
    # Before these came the warm-up's.
    ttfts = paired_ratios(ttfts_s["half"][-rounds:], ttfts_s["whole"][-rounds:])
    return Measurement(paired_ratios(rates["half"], rates["whole"])), Measurement(ttfts)


def hot_and_cold(bench: Bench) -> Measurements:
    """The tail of the time to the first token over its median, under random arrivals.

    What the machine gets through is measured before each round: what it carried a minute ago may be too much now.
    """
    with bench.opened(Size(HOT_AND_COLD_SLOTS, COLD_DOMAINS + 1)) as system:
        seeds = iter(range(1000))

        def tail() -> float:
            window = _closed_loop(system, bench.effort.turnover_requests, _hot_or_cold(next(seeds)), MAX_BATCH_SIZE)
            requests_per_s = LOAD_SHARE * window.tokens_per_s / bench.effort.new_tokens
            return _open_loop(system, bench.effort.open_requests, requests_per_s, next(seeds))

        ratios = bench.interleaved(
            "one hot and 50 cold domains", {"p99/p50": tail}, bench.effort.open_rounds, is_warm=True
        )
    return {"ttft_p99_over_p50": Measurement(ratios["p99/p50"])}


class _Window:
    """A play without its start: from when as many have been answered as are in flight."""

    def __init__(self, played: Played, in_flight: int) -> None:
        lines = played.timelines.values()
        ends_s = sorted(line.last_s for line in lines if line.last_s is not None)
        start_s, end_s = ends_s[in_flight - 1], ends_s[-1]
        self.tokens_per_s = played.tokens_between(start_s, end_s) / (end_s - start_s)
        self.ttft_p50_s = percentile([line.ttft_s for line in lines if line.arrived_s >= start_s], 0.5)


def _closed_loop(system: System, num_requests: int, mixture_of: MixtureOf, in_flight: int) -> _Window:
    """So many requests unanswered at any time.

    The first ones are shorter, each by another length, so that the others do not start and end in step.
    """
    new_tokens = system.workload.new_tokens

    def length(index: int) -> int:
        return new_tokens if index >= in_flight else math.ceil(new_tokens * (index + 1) / in_flight)

    requests = system.workload.requests(num_requests, mixture_of, length)
    return _Window(system.client.play(requests, in_flight), in_flight)


def _open_loop(system: System, num_requests: int, requests_per_s: float, seed: int) -> float:
    """Poisson arrivals; the 99th percentile of the time to the first token over the median."""
    generator = random.Random(f"arrivals {seed}")
    arrivals_s = [generator.expovariate(requests_per_s)]
    while len(arrivals_s) < num_requests:
        arrivals_s.append(arrivals_s[-1] + generator.expovariate(requests_per_s))
    requests = system.workload.requests(num_requests, _hot_or_cold(seed))
    played = system.client.play(requests, in_flight=num_requests, arrivals_s=arrivals_s)
    ttfts_s = [line.ttft_s for line in played.timelines.values()]
    return percentile(ttfts_s, 0.99) / percentile(ttfts_s, 0.5)


def _hot_or_cold(seed: int) -> Callable[[int], Mixture]:
    """Half of the requests to domain 0, each of the others to one of the cold ones at random."""
    generator = random.Random(f"domains {seed}")

    def mixture_of(index: int) -> Mixture:
        number = 0 if generator.random() < 0.5 else generator.randint(1, COLD_DOMAINS)
        return Mixture.of({domain(number): 1.0})

    return mixture_of
