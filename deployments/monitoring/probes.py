"""Labelled prompts that the router is asked every minute, so that its accuracy is known without anybody's judgement."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from cluster.errors import InvalidData, ZephyraError
from cluster.lora.artifacts import Store
from cluster.lora.catalog import CatalogState
from cluster.messages import RoutingDecision
from cluster.router.examples import MAX_EXAMPLES_BYTES, examples_beside
from deployments.monitoring.accuracy import Accuracy, Decided, Judged

logger = logging.getLogger("ray.serve")

PROBES_FILE = "probes.jsonl"
"""In the root: `{"prompt": ..., "domain": ...}` per line, `none` for what no domain should answer."""

PERIOD_S = 60.0
_MAX_PROBES, _PER_DOMAIN, _BATCH = 2000, 20, 32
"""A batch is short, since live prompts wait for it."""

Route = Callable[[Sequence[str]], Awaitable[list[RoutingDecision]]]


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt and its domain."""

    prompt: str
    domain: str


def read_probes(store: Store, state: CatalogState) -> list[Probe]:
    """Those of the root's `probes.jsonl`, or else the first examples that lie beside each adapter.

    Raises `InvalidData` for a file that cannot be read, `StorageUnavailable`.
    """
    try:
        content = store.storage.read(PROBES_FILE, MAX_EXAMPLES_BYTES)
    except FileNotFoundError:
        return _from_examples(store, state)
    try:
        lines = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
        probes = [Probe(str(line["prompt"]), str(line["domain"])) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(
            f"{PROBES_FILE} cannot be read ({error}); expected {{'prompt': ..., 'domain': ...}} per line."
        ) from error
    return probes[:_MAX_PROBES]


def _from_examples(store: Store, state: CatalogState) -> list[Probe]:
    probes: list[Probe] = []
    # Whoever has examples has prototypes; of ten thousand domains no more are read than are asked.
    for domain in sorted(state.prototypes):
        if len(probes) >= _MAX_PROBES:
            break
        if (examples := examples_beside(store, state.ref(domain))) is not None:
            probes += [Probe(prompt, domain) for prompt in examples.prompts[:_PER_DOMAIN]]
    return probes


class Prober:
    """Scores the probes. Must be made inside a running event loop."""

    def __init__(self, store: Store, state: Callable[[], CatalogState], route: Route, accuracy: Accuracy) -> None:
        self._store, self._state, self._route, self._accuracy = store, state, route, accuracy

    def start(self) -> asyncio.Task[None]:
        """Score them every minute; the caller keeps the task."""
        return asyncio.get_running_loop().create_task(self._forever())

    async def score(self) -> int:
        """Ask the router all probes and set the gauges; how many there were."""
        probes = await asyncio.to_thread(read_probes, self._store, self._state())
        judged: list[Judged] = []
        for first in range(0, len(probes), _BATCH):
            batch = probes[first : first + _BATCH]
            decisions = await self._route([probe.prompt for probe in batch])
            for probe, decision in zip(batch, decisions, strict=True):
                judged.append(Judged(Decided.of(decision), probe.domain))
        self._accuracy.replace(judged)
        return len(judged)

    async def _forever(self) -> None:
        while True:
            try:
                await self.score()
            except ZephyraError as error:
                logger.warning("The probes were not scored: %s", error)
            except Exception:
                logger.exception("The probes were not scored.")
            await asyncio.sleep(PERIOD_S)
