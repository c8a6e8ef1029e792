"""The adapter plane as a whole, on a real cluster: what is published, cold, resident, spread, or gone.

A ratio compares runs of the same minutes; times are of the machine as it was.
"""

import asyncio
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.adapters_cluster import Answered, Load, ServedRoot, memory_of, served
from benchmarks.adapters_root import adapter_bytes, domain, write_root
from benchmarks.figures import Measurement, Measurements, paired_ratios, percentile
from cluster.lora.placement import shard_of
from cluster.messages import AdapterRef

RANK = 8
FEW = 64
"""Domains of the small root, and those that are asked for of the large one."""
IN_FLIGHT = 16


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is run."""

    many: int = 10_000
    """Domains of the large root."""
    requests: int = 400
    """Of each load."""
    rounds: int = 3
    new_tokens: int = 32
    load_s: float = 10.0
    """Of the loads that something happens under."""
    pace_rounds: int = 7
    """Of answers with and without loading beside them: the machine's own pace wavers more than loading costs."""
    pace_s: float = 4.0
    """Of each of them."""


QUICK = Effort(many=200, requests=64, rounds=1, new_tokens=4, load_s=4.0, pace_rounds=1)


class ServingBench:
    """What a scenario is given: roots, written when first needed."""

    def __init__(self, folder: Path, is_quick: bool, console: Console) -> None:
        self.is_quick = is_quick
        self.effort = QUICK if is_quick else Effort()
        self._folder = folder
        self.console = console

    def root(self, num_domains: int, rank: int = RANK) -> Path:
        """A root with so many domains."""
        root = self._folder / f"root{num_domains}-{rank}"
        if not root.exists():
            self.console.print(f"writing {num_domains:,} adapters ...")
            write_root(root, num_domains, rank)
        return root

    @contextmanager
    def copy_of_root(self, num_domains: int) -> Iterator[Path]:
        """One to be changed."""
        root = self.root(num_domains)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            yield shutil.copytree(root, Path(folder) / "root")

    @contextmanager
    def cluster(self, num_domains: int, num_slots: int, rank: int = RANK, **settings: Any) -> Iterator[ServedRoot]:
        """A cluster over the root of so many domains, whose slot banks hold `num_slots` of them in bf16."""
        root = self.root(num_domains, rank)
        engine = {"adapter_bytes": num_slots * adapter_bytes(root)}
        self.console.print(f"serving {num_domains:,} domains, {num_slots} slots, {settings or 'by default'}")
        with served(root, dtype="bfloat16", engine=engine, **settings) as cluster:
            yield cluster


def affinity(bench: ServingBench) -> Measurements:
    """Two replicas that each hold five eighths of the domains in use: the share of requests that load nothing."""
    shares = {}
    for name, slack in (("affinity_hit_rate", 8), ("no_affinity_hit_rate", None)):
        with bench.cluster(
            FEW, num_slots=FEW * 5 // 8, replicas=2, host_adapter_bytes=0, affinity_slack=slack
        ) as cluster:
            rng = random.Random(0)
            warm_up = [rng.randrange(FEW) for _ in range(4 * FEW)]
            cluster.run(partial(Load.closed, numbers=warm_up, in_flight=4, max_tokens=4))
            repeats = []
            for _ in range(bench.effort.rounds):
                numbers = [rng.randrange(FEW) for _ in range(bench.effort.requests)]
                before = cluster.num_loads()
                cluster.run(partial(Load.closed, numbers=numbers, in_flight=4, max_tokens=4))
                repeats.append(1 - (cluster.num_loads() - before) / len(numbers))
        shares[name] = Measurement(tuple(repeats))
    return shares


def cold(bench: ServingBench) -> Measurements:
    """First tokens of domains never asked for beside those of resident ones; and what loading does to others.

    The pace of answers under way is taken in turn with nothing beside them, with short requests to resident domains,
    and with the same to cold ones: the first two differ by what any request costs others, the last two by the loading.
    """
    num_cold = min(bench.effort.requests, bench.effort.many // 4)
    fresh = itertools.count(bench.effort.many // 2)
    beside = {"nothing": None, "resident": itertools.cycle(range(4, FEW // 2)), "cold": fresh}
    gaps_s: dict[str, list[list[float]]] = {name: [] for name in beside}
    with bench.cluster(bench.effort.many, num_slots=FEW) as cluster:
        warm_s, cold_s = cluster.run(partial(_warm_and_cold, num_cold=num_cold))
        cluster.run(partial(Load.closed, numbers=list(range(FEW // 2)), in_flight=4, max_tokens=1))
        for number in range(bench.effort.pace_rounds):
            for name in list(beside)[:: -1 if number % 2 else 1]:
                pace = partial(_others_gaps, seconds=bench.effort.pace_s, numbers=beside[name])
                gaps_s[name].append(cluster.run(pace))
    third = len(cold_s) // 3
    p99, p50 = ({name: [of(gaps) for gaps in rounds] for name, rounds in gaps_s.items()} for of in (_p99, median))
    return {
        "warm_first_token_p99_s": Measurement((percentile(warm_s, 0.99),)),
        "cold_over_warm_p99": Measurement((percentile(cold_s, 0.99) / percentile(warm_s, 0.99),)),
        "cold_over_warm_p50": Measurement((median(cold_s) / median(warm_s),)),
        "cold_late_over_early": Measurement((median(cold_s[-third:]) / median(cold_s[:third]),)),
        "others_tpot_p99_ratio": Measurement(paired_ratios(p99["cold"], p99["nothing"])),
        "others_tpot_p50_ratio": Measurement(paired_ratios(p50["cold"], p50["nothing"])),
        "resident_requests_tpot_p99_ratio": Measurement(paired_ratios(p99["resident"], p99["nothing"])),
        "loading_tpot_p99_ratio": Measurement(paired_ratios(p99["cold"], p99["resident"])),
    }


def _p99(values: Sequence[float]) -> float:
    return percentile(values, 0.99)


async def _warm_and_cold(load: Load, num_cold: int) -> tuple[list[float], list[float]]:
    """Times to the first token, taken in turn: of the last domain again, and of one never asked for."""
    for _ in range(20):
        await load.ask(0)
    warm_s, cold_s = [], []
    for number in range(1, num_cold + 1):
        cold_s.append((await load.ask(number)).chunks_s[0])
        warm_s.append((await load.ask(number)).chunks_s[0])
    return warm_s, cold_s


async def _others_gaps(load: Load, seconds: float, numbers: Iterator[int] | None) -> list[float]:
    """Times between tokens of four answers under way, while domains of `numbers` are asked for one by one, or none."""
    ended = asyncio.Event()

    async def keep_asking(numbers: Iterator[int]) -> None:
        while not ended.is_set():
            await load.ask(next(numbers))
            await asyncio.sleep(0.05)

    asking = [] if numbers is None else [asyncio.ensure_future(keep_asking(numbers))]
    gaps_s: list[float] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        answers = await asyncio.gather(*(load.stream(number, max_tokens=400) for number in range(4)))
        gaps_s += [gap for answer in answers for gap in answer.gaps_s]
    ended.set()
    await asyncio.gather(*asking)
    return gaps_s


def published(bench: ServingBench) -> Measurements:
    """The same load on 64 of the domains, of few or of many published; and Zipf's law over the many.

    The bound of the last is what its bytes predict: the time that the few take, and that of copying what was loaded.
    """
    rates: dict[int, list[float]] = {FEW: [], bench.effort.many: []}
    zipf: list[tuple[float, int]] = []
    for number in range(bench.effort.rounds):
        for num_domains in list(rates)[:: -1 if number % 2 else 1]:
            with bench.cluster(num_domains, num_slots=FEW) as cluster:
                cluster.run(partial(Load.closed, numbers=list(range(FEW)), in_flight=IN_FLIGHT, max_tokens=2))
                numbers = random.Random(number).choices(range(FEW), k=bench.effort.requests)
                rates[num_domains].append(_tokens_per_s(bench, cluster, numbers))
                if num_domains != FEW:
                    before = cluster.num_loads()
                    rate = _tokens_per_s(bench, cluster, _zipf(num_domains, bench.effort.requests, number))
                    zipf.append((rate, cluster.num_loads() - before))
    many, few = rates[bench.effort.many], rates[FEW]
    loaded_bytes = median(loads for _, loads in zipf) * adapter_bytes(bench.root(FEW))
    few_s = bench.effort.requests * bench.effort.new_tokens / median(few)
    predicted = few_s / (few_s + loaded_bytes / _copy_bytes_per_s())
    return {
        "published10000_over_64": Measurement(paired_ratios(many, few)),
        "zipf_over_64": Measurement(paired_ratios([rate for rate, _ in zipf], few), bound=predicted),
        "zipf_loads_per_request": Measurement(tuple(loads / bench.effort.requests for _, loads in zipf)),
    }


def _tokens_per_s(bench: ServingBench, cluster: ServedRoot, numbers: Sequence[int]) -> float:
    answers, took_s = cluster.run(
        partial(Load.closed, numbers=numbers, in_flight=IN_FLIGHT, max_tokens=bench.effort.new_tokens)
    )
    assert {answer.status for answer in answers} == {200}
    return len(numbers) * bench.effort.new_tokens / float(took_s)


def _zipf(num_domains: int, num_requests: int, seed: int) -> list[int]:
    """Domains drawn with probabilities as 1, 1/2, 1/3, ..."""
    weights = [1 / rank for rank in range(1, num_domains + 1)]
    return random.Random(seed).choices(range(num_domains), weights, k=num_requests)


def _copy_bytes_per_s() -> float:
    source = bytearray(2**28)
    times_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        bytes(source)
        times_s.append(time.perf_counter() - start_s)
    return len(source) / min(times_s)


def memory(bench: ServingBench) -> Measurements:
    """What processes hold with few and with many published, and what each adapter that is used adds to a shard."""
    held: dict[int, int] = {}
    for num_domains in (FEW, bench.effort.many):
        with bench.cluster(num_domains, num_slots=FEW, copies=1) as cluster:
            held[num_domains] = sum(
                sum(memory_of(name).values()) for name in ("AdapterShard", "Coordinator", "Gateway", "BaseReplica")
            )
            before = sum(memory_of("AdapterShard").values())
            num_used = min(bench.effort.requests, num_domains)
            cluster.run(partial(Load.closed, numbers=list(range(num_used)), in_flight=4, max_tokens=1))
            used_bytes = num_used * adapter_bytes(bench.root(num_domains))
            growth = (sum(memory_of("AdapterShard").values()) - before) / used_bytes
    return {
        "memory_10000_over_64": Measurement((held[bench.effort.many] / held[FEW],)),
        "shard_growth_over_used_bytes": Measurement((growth,)),
        "shard_mib": Measurement((before / 2 / 2**20,)),
    }


def shard_loss(bench: ServingBench) -> Measurements:
    """A shard dies under a load of domains never asked for: with two copies of each, then the only one."""
    failed = []
    with bench.cluster(bench.effort.many, num_slots=FEW, copies=2) as cluster:
        statuses = cluster.run(partial(_kill_under_load, bench=bench, cluster=cluster))
        failed.append(sum(status != 200 for status in statuses))
    with bench.cluster(bench.effort.many, num_slots=FEW, copies=1) as cluster:
        recovery_s, others_failed = cluster.run(partial(_only_copy, bench=bench, cluster=cluster))
    return {
        "failed_on_shard_kill": Measurement(tuple(failed)),
        "requests_during_shard_kill": Measurement((len(statuses),)),
        "shard_recovery_s": Measurement((recovery_s,)),
        "failed_on_other_shards": Measurement((others_failed,)),
    }


async def _kill_under_load(load: Load, bench: ServingBench, cluster: ServedRoot) -> list[int]:
    numbers = iter(range(1, bench.effort.many))
    statuses: list[int] = []
    end_s = time.perf_counter() + bench.effort.load_s

    async def keep_asking() -> None:
        while time.perf_counter() < end_s and (number := next(numbers, None)) is not None:
            statuses.append((await load.ask(number)).status)

    tasks = [asyncio.ensure_future(keep_asking()) for _ in range(4)]
    await asyncio.sleep(bench.effort.load_s / 4)
    cluster.kill("AdapterShard-0")
    await asyncio.gather(*tasks)
    return statuses


async def _only_copy(load: Load, bench: ServingBench, cluster: ServedRoot) -> tuple[float, int]:
    """How long after its death a shard's domain is served again; how many of the other shard's failed until then."""
    owner = partial(_owner, num_shards=2)
    lost = iter([number for number in range(bench.effort.many) if owner(number) == 0])
    others = iter([number for number in range(bench.effort.many) if owner(number) == 1])
    cluster.kill("AdapterShard-0")
    start_s, num_failed = time.perf_counter(), 0
    while (await load.ask(next(lost))).status != 200:
        other: Answered = await load.ask(next(others))
        num_failed += other.status != 200
    return time.perf_counter() - start_s, num_failed


def fan_out(bench: ServingBench) -> Measurements:
    """A coordinator asks four shards at once for four adapters of rank 16, each another shard's, which they have."""
    with bench.cluster(FEW, num_slots=FEW, rank=16, shards=4) as cluster:
        numbers = [next(number for number in range(FEW) if _owner(number, 4) == shard) for shard in range(4)]
        times_s = cluster.time_fetches([AdapterRef(domain(number), 1) for number in numbers], 4, bench.effort.requests)
    return {
        "fanout4_p50_ms": Measurement((1000 * median(times_s),)),
        "fanout4_p99_ms": Measurement((1000 * percentile(times_s, 0.99),)),
    }


def _owner(number: int, num_shards: int) -> int:
    return shard_of(AdapterRef(domain(number), 1), num_shards)


SERVING_SCENARIOS: dict[str, tuple[Callable[[ServingBench], Measurements], str]] = {
    "affinity": (affinity, "two replicas: requests that find their adapter resident"),
    "cold": (cold, "first token of a domain on a shard, and the pace of others meanwhile"),
    "published": (published, "throughput with 10,000 published against 64, and under Zipf's law"),
    "memory": (memory, "memory by what is published and by what is used"),
    "fan_out": (fan_out, "four adapters from four shards"),
    "shard_loss": (shard_loss, "a shard dies, with two copies and with one"),
}
