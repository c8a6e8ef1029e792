"""Domains published and withdrawn while a system serves: how soon they are live, and what that costs requests."""

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.adapters_cluster import Answered, Load, ServedRoot, served
from benchmarks.adapters_root import adapter_bytes, domain
from benchmarks.adapters_serving import FEW, ServingBench
from benchmarks.figures import Measurement, Measurements
from cluster.config.training import RouterSettings
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, Change
from cluster.messages import NONE_DOMAIN, AdapterRef
from cluster.model.base import load_base
from cluster.router.fit import RouterFit
from cluster.router.tiny_ada import TinyAda
from deployments.domains.operations import Domains

_ROUTED = 8
"""Domains that the router is trained on."""
_EXAMPLES, _WORDS = 5, 6
"""Prompts of a domain, and words of each."""
_CLIENTS = 4
_TOKENS = 8
_TIMED, _CHANGES = 12, 200
_TIMED_QUICK, _CHANGES_QUICK = 3, 9
_POLL_S = 0.01
_GIVE_UP_S = 20.0


def publish(bench: ServingBench) -> Measurements:
    """Two replicas under load: from the catalog's generation to routed and generating on both; then 200 changes."""
    num_timed, num_changes = (_TIMED_QUICK, _CHANGES_QUICK) if bench.is_quick else (_TIMED, _CHANGES)
    with bench.copy_of_root(FEW) as root:
        _publish_router(root)
        engine = {"adapter_bytes": 2 * FEW * adapter_bytes(root)}
        # Whichever replica is idler, so that both come to generate.
        settings = {"dtype": "bfloat16", "engine": engine, "replicas": 2, "affinity_slack": None}
        with served(root, **settings) as cluster:
            scenario = _Publishing(root, cluster)
            routed_s, live_s = cluster.run(partial(scenario.time_publishes, number=num_timed))
            num_failed, num_requests, num_lost = cluster.run(partial(scenario.change, number=num_changes))
    for problem in sorted(scenario.problems):
        bench.console.print(f"publish: a request failed: {problem}", highlight=False)
    return {
        "publish_to_routed_s": Measurement(tuple(routed_s)),
        "publish_to_live_s": Measurement(tuple(live_s)),
        "publish_to_live_worst_s": Measurement((max(live_s),)),
        "failed_during_publish": Measurement((num_failed,)),
        "requests_during_publish": Measurement((num_requests,)),
        "lost_publishes": Measurement((num_lost,)),
    }


class _Publishing:
    """What happens to one served root."""

    def __init__(self, root: Path, cluster: ServedRoot) -> None:
        self._root, self._cluster = root, cluster
        self._domains = Domains(Store(root))
        self._adapter = root / "handed_in"
        shutil.copytree(root / "adapters" / domain(0) / "1", self._adapter)
        self._failed = self._answered = 0
        self.problems: set[str] = set()
        """What failed requests were told."""

    async def time_publishes(self, load: Load, number: int) -> tuple[list[float], list[float]]:
        """Seconds from each generation's being written to its domain's being routed, and to its being live."""
        routed_s: list[float] = []
        live_s: list[float] = []

        async def publish_some() -> None:
            for index in range(number):
                name = f"timed{index}"
                await asyncio.to_thread(self._domains.add, name, self._adapter, _prompts(name))
                generation = Catalog(self._root).latest()
                written_s = (self._root / "catalog" / f"{generation}.json").stat().st_mtime
                await self._until_routed(load, name)
                routed_s.append(time.time() - written_s)
                await self._until_generating(load, name)
                live_s.append(time.time() - written_s)

        await self._under_load(load, publish_some)
        return routed_s, live_s

    async def _until_routed(self, load: Load, name: str) -> None:
        """Until every prompt of its own is routed to it."""
        end_s = time.perf_counter() + _GIVE_UP_S
        prompts = _prompts(name)
        while set(await asyncio.gather(*(load.routed_to(prompt) for prompt in prompts))) != {name}:
            assert time.perf_counter() < end_s, f"{name} is not routed after {_GIVE_UP_S:g} s"
            await asyncio.sleep(_POLL_S)

    async def _until_generating(self, load: Load, name: str) -> None:
        """Until every replica has answered with it."""
        end_s, ref = time.perf_counter() + _GIVE_UP_S, str(AdapterRef(name, 1))
        while True:
            answers = await asyncio.gather(*(load.complete("def f(x):", f"zephyra:{name}", 1) for _ in range(4)))
            assert all(answer.status == 200 for answer in answers), f"{name} is routed and not served"
            stats = await asyncio.to_thread(self._cluster.stats)
            if all(ref in map(str, replica.resident_adapters) for replica in stats):
                return
            assert time.perf_counter() < end_s, f"{name} is not on all replicas after {_GIVE_UP_S:g} s"

    async def change(self, load: Load, number: int) -> tuple[int, int, int]:
        """Publish and withdraw, so many changes in all: failed requests, all requests, and changes that were lost.

        Two of three changes publish; a third withdraws the oldest that is left, while it answers.
        """
        self._failed = self._answered = 0
        before = Catalog(self._root).load()
        expected = dict(before.adapters)

        async def change_all() -> None:
            present: list[str] = []
            for index in range(number):
                if index % 3 < 2:
                    name = f"changed{index}"
                    await asyncio.to_thread(self._domains.add, name, self._adapter, _prompts(name))
                    present.append(name)
                    expected[name] = 1
                else:
                    await self._withdraw(load, name := present.pop(0))
                    del expected[name]

        await self._under_load(load, change_all)
        after = Catalog(self._root).load()
        num_lost = len(expected.items() ^ dict(after.adapters).items()) + after.generation - before.generation - number
        await asyncio.sleep(1.0)
        served_names = {name.partition(":")[2] for name in await load.models()} - {""}
        return self._failed, self._answered, num_lost + len(served_names ^ expected.keys())

    async def _withdraw(self, load: Load, name: str) -> None:
        """Withdraw a domain that is answering: the answer must end as it began."""
        while not self._is_known(await load.models(), name):
            await asyncio.sleep(_POLL_S)
        begun = asyncio.Event()
        answering = asyncio.ensure_future(load.watched("Go on", f"zephyra:{name}", 4 * _TOKENS, begun))
        # A request that comes after the withdrawal is refused, as it should be.
        await begun.wait()
        await asyncio.to_thread(self._domains.remove, name)
        self._count(await answering)

    @staticmethod
    def _is_known(models: list[str], name: str) -> bool:
        return f"zephyra:{name}" in models

    def _count(self, answer: Answered) -> None:
        self._answered += 1
        if answer.status != 200 or answer.problem:
            self._failed += 1
            self.problems.add(answer.problem)

    async def _under_load(self, load: Load, work: Callable[[], Awaitable[Any]]) -> None:
        """`work` while clients keep asking: domains by name, and prompts of known and of new domains to be routed."""
        ended = asyncio.Event()

        async def keep_asking(seed: int) -> None:
            rng = random.Random(seed)
            while not ended.is_set():
                number = rng.randrange(FEW)
                if rng.random() < 0.5:
                    answer = await load.complete("def f(x):", f"zephyra:{domain(number)}", _TOKENS)
                else:
                    about = rng.choice((domain(number % _ROUTED), f"changed{number}", f"timed{number % _TIMED}"))
                    answer = await load.complete(_prompts(about)[0], "zephyra", _TOKENS)
                self._count(answer)

        clients = [asyncio.ensure_future(keep_asking(seed)) for seed in range(_CLIENTS)]
        try:
            await work()
        finally:
            ended.set()
            await asyncio.gather(*clients)


def _prompts(name: str) -> list[str]:
    """Made-up words, always the same for one name."""
    rng = random.Random(name)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(2 * _WORDS)]
    return [" ".join(rng.sample(words, _WORDS)) for _ in range(_EXAMPLES)]


def made_up_router(num_base_parameters: int, width: int = RouterSettings().width) -> TinyAda:
    """One that knows a few of the domains by such prompts."""
    names = [*(domain(number) for number in range(_ROUTED)), NONE_DOMAIN]
    texts = [text for name in names for text in _prompts(name)]
    labels = [name for name in names for _ in range(_EXAMPLES)]
    settings = RouterSettings(steps=40, batch_size=16, width=width)
    fit = RouterFit(texts, labels, texts, labels, settings, num_base_parameters)
    for _ in range(fit.num_steps):
        fit.step()
    return fit.finish()


def _publish_router(root: Path) -> None:
    catalog = Catalog(root)
    base = load_base(root / "base" / str(catalog.load().base))
    ada = made_up_router(base.num_parameters)
    catalog.publish(Change(router=catalog.store.write_version("router", ada.save)))
