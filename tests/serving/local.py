"""The deployments wired to one another without Ray: what crosses a process border there is pickled here as well."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.serving import AppSettings
from cluster.messages import RoutingDecision
from deployments.api.gateway import Gateway
from deployments.replica.base_replica import BaseReplica
from deployments.shards.adapter_shard import AdapterShard
from deployments.shards.coordinator import Coordinator


class LocalHandle:
    """A handle whose deployment lives in this process."""

    def __init__(self, target: object, method_name: str = "", stream: bool = False) -> None:
        self._target, self._method_name, self._stream = target, method_name, stream

    def options(self, *, method_name: str, stream: bool, _by_reference: bool, **_: str) -> "LocalHandle":
        return LocalHandle(self._target, method_name, stream)

    def remote(self, *args: Any) -> Any:
        result = getattr(self._target, self._method_name)(*_across(args))
        return LocalStream(result) if self._stream else asyncio.ensure_future(_awaited(result))


class LocalStream:
    """Runs the callee's generator in a task of its own, as a replica would, until it ends or `cancel` is called."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._pump(items))

    def cancel(self) -> None:
        self._task.cancel()

    def __aiter__(self) -> "LocalStream":
        return self

    async def __anext__(self) -> Any:
        kind, item = await self._queue.get()
        if kind == "item":
            return item
        raise item

    async def _pump(self, items: AsyncIterator[Any]) -> None:
        try:
            async for item in items:
                self._queue.put_nowait(("item", _across(item)))
            self._queue.put_nowait(("end", StopAsyncIteration()))
        except Exception as error:
            self._queue.put_nowait(("end", _across(error)))


class GoneHandle:
    """A handle whose deployment never answers; it counts the calls that are still open."""

    def __init__(self) -> None:
        self.num_open = 0

    def options(self, *, method_name: str, stream: bool, _by_reference: bool, **_: str) -> "GoneHandle":
        return self

    def remote(self, *args: Any) -> "GoneCall":
        return GoneCall(self)


class GoneCall:
    """One call to it, unary or streamed."""

    def __init__(self, handle: GoneHandle) -> None:
        self._handle = handle
        handle.num_open += 1

    def cancel(self) -> None:
        self._handle.num_open -= 1

    def __await__(self) -> Any:
        return asyncio.sleep(3600).__await__()

    async def __anext__(self) -> Any:
        await asyncio.sleep(3600)


class WordRouter:
    """Decides by the words of a prompt: each domain that is named gets an equal weight."""

    def __init__(self, domains: Sequence[str]) -> None:
        self._domains = domains

    async def route(self, texts: Sequence[str]) -> list[RoutingDecision]:
        return [self._decide(text) for text in texts]

    async def route_conversation(self, turns: Sequence[str]) -> RoutingDecision:
        """The newest turn's domains, or those of the last one before it that names any."""
        decided = [self._decide(text) for text in turns]
        return next((decision for decision in reversed(decided) if decision.weights), decided[-1])

    def _decide(self, text: str) -> RoutingDecision:
        named = [domain for domain in self._domains if domain in text]
        share = {domain: 1 / len(named) for domain in named}
        return RoutingDecision({**dict.fromkeys(self._domains, 0.0), "none": 0.0 if named else 1.0, **share}, share)


@dataclass(frozen=True)
class LocalSystem:
    """All deployments, from the Gateway to the shards, over a real root."""

    gateway: Gateway
    replica: BaseReplica
    shards: list[AdapterShard]


def local_system(root: Path, domains: Sequence[str], num_shards: int = 2) -> LocalSystem:
    """The whole flow in this process; only the router is simpler than the real one."""
    settings = AppSettings(root=str(root), threads=1, shards=num_shards)
    shards = [AdapterShard(str(root)) for _ in range(num_shards)]
    coordinator = Coordinator([LocalHandle(shard) for shard in shards])
    replica = BaseReplica(LocalHandle(coordinator), settings)
    gateway = Gateway(LocalHandle(WordRouter(domains)), LocalHandle(replica), str(root))
    return LocalSystem(gateway, replica, shards)


def _across(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


async def _awaited(result: Any) -> Any:
    return _across(await result)
