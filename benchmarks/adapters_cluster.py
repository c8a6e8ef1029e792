"""A served root under load: requests over HTTP with the times at which their tokens came, and what processes hold.

Knows nothing of what is measured.
"""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.util import list_named_actors

from benchmarks.adapters_root import domain
from cluster.config.serving import AppSettings
from cluster.engine.engine import EngineStats
from cluster.lora.packed_adapter import PackedAdapter
from cluster.messages import AdapterRef
from deployments import calls
from deployments.application import APPLICATION_NAME, ONE_LOOP
from deployments.cluster import HOST, Ports, serving
from deployments.shards.coordinator import Coordinator

_TIMEOUT_S = 60.0
_WARM_UP_FETCHES = 20


@dataclass(slots=True)
class Answered:
    """One request: whether it was answered, and when its chunks came, in seconds since it was sent."""

    status: int
    chunks_s: list[float] = field(default_factory=list)
    problem: str = ""
    """What was said instead of an answer."""

    @property
    def gaps_s(self) -> list[float]:
        """Times between chunks."""
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]


class ServedRoot:
    """A cluster that serves one root."""

    def __init__(self, url: str) -> None:
        self._url = url

    def run(self, load: Callable[["Load"], Awaitable[Any]]) -> Any:
        """What `load` gives, run in an event loop of its own."""

        async def scenario() -> Any:
            limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
            async with httpx.AsyncClient(base_url=self._url, timeout=_TIMEOUT_S, limits=limits) as client:
                return await load(Load(client))

        return asyncio.run(scenario())

    def stats(self) -> list[EngineStats]:
        """Of each base replica."""
        handle = serve.get_deployment_handle("BaseReplica", APPLICATION_NAME)
        results: list[EngineStats] = handle.broadcast("stats").results(timeout_s=_TIMEOUT_S)
        return results

    def num_loads(self) -> int:
        """Adapters that came into slot banks so far."""
        return sum(len(one.resident_adapters) + one.num_evictions for one in self.stats())

    def time_fetches(self, refs: Sequence[AdapterRef], num_shards: int, num_fetches: int) -> list[float]:
        """Seconds that a coordinator of its own, in its own process, takes to fetch all of `refs`, time after time."""
        options = {"num_cpus": 0.1, "runtime_env": {"env_vars": ONE_LOOP}}
        timed = serve.deployment(name="TimedCoordinator", ray_actor_options=options)(TimedCoordinator)
        handle = serve.run(timed.bind(num_shards), name="timed", route_prefix=None)
        times_s: list[float] = handle.time_fetches.remote(tuple(refs), num_fetches).result(timeout_s=10 * _TIMEOUT_S)
        serve.delete("timed")
        return times_s

    def kill(self, deployment: str) -> None:
        """As if the machines of all its replicas had lost power."""
        prefix = f"SERVE_REPLICA::{APPLICATION_NAME}#{deployment}#"
        for actor in list_named_actors(all_namespaces=True):
            if actor["name"].startswith(prefix):
                ray.kill(ray.get_actor(actor["name"], namespace="serve"))


class TimedCoordinator(Coordinator):
    """One that times itself, beside the application's own."""

    def __init__(self, num_shards: int) -> None:
        names = [f"AdapterShard-{index}" for index in range(num_shards)]
        super().__init__([serve.get_deployment_handle(name, APPLICATION_NAME) for name in names])

    async def time_fetches(self, refs: tuple[AdapterRef, ...], num_fetches: int) -> list[float]:
        """Seconds of each fetch, the first few left out."""
        times_s = []
        for _ in range(num_fetches + _WARM_UP_FETCHES):
            start_s = time.perf_counter()
            async with aclosing(self.fetch(refs, calls.MESSAGE_BYTES)) as answers:
                found = [fetched.result async for fetched in answers]
            times_s.append(time.perf_counter() - start_s)
            assert all(isinstance(result, PackedAdapter) for result in found), found
        return times_s[_WARM_UP_FETCHES:]


class Load:
    """Sends requests."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def ask(self, number: int, max_tokens: int = 1) -> Answered:
        """A short prompt to one domain, answered whole."""
        start_s = time.perf_counter()
        response = await self._client.post("/v1/completions", json=_body(number, max_tokens))
        return Answered(response.status_code, [time.perf_counter() - start_s])

    async def stream(self, number: int, max_tokens: int) -> Answered:
        """The same, chunk by chunk."""
        return await self._streamed(_body(number, max_tokens), asyncio.Event())

    async def complete(self, prompt: str, model: str, max_tokens: int) -> Answered:
        """A prompt to a model, answered whole."""
        start_s = time.perf_counter()
        body = {"prompt": prompt, "model": model, "max_tokens": max_tokens, "ignore_eos": True}
        response = await self._client.post("/v1/completions", json=body)
        problem = "" if response.status_code == 200 else response.text
        return Answered(response.status_code, [time.perf_counter() - start_s], problem)

    async def watched(self, prompt: str, model: str, max_tokens: int, begun: asyncio.Event) -> Answered:
        """The same, chunk by chunk: `begun` is set when the first of the answer is there, or it has failed."""
        body = {"prompt": prompt, "model": model, "max_tokens": max_tokens, "ignore_eos": True}
        return await self._streamed(body, begun)

    async def _streamed(self, body: Mapping[str, object], begun: asyncio.Event) -> Answered:
        start_s = time.perf_counter()
        async with self._client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            answered = Answered(response.status_code)
            async for line in response.aiter_lines():
                begun.set()
                chunk = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                if response.status_code != 200 or "error" in chunk:
                    answered.problem += line
                elif chunk:
                    answered.chunks_s.append(time.perf_counter() - start_s)
        begun.set()
        return answered

    async def routed_to(self, prompt: str) -> str | None:
        """The domain that the router gives most weight for a prompt, None for the base."""
        mixture = (await self._client.post("/v1/route", json={"prompt": prompt})).json()["mixture"]
        return max(mixture, key=mixture.__getitem__).partition("@")[0] if mixture else None

    async def models(self) -> list[str]:
        """What requests may name."""
        return [model["id"] for model in (await self._client.get("/v1/models")).json()["data"]]

    async def closed(self, numbers: Sequence[int], in_flight: int, max_tokens: int) -> tuple[list[Answered], float]:
        """One request for each of `numbers`, so many unanswered at any time; and how long all took."""
        left, answers = iter(numbers), list[Answered]()

        async def keep_asking() -> None:
            for number in left:
                answers.append(await self.ask(number, max_tokens))

        start_s = time.perf_counter()
        await asyncio.gather(*(keep_asking() for _ in range(in_flight)))
        return answers, time.perf_counter() - start_s


@contextmanager
def served(root: Path, **settings: Any) -> Iterator[ServedRoot]:
    """A cluster of this machine that serves `root`, for as long as the context lasts."""
    ports = Ports(http=free_port(), grpc=free_port(), dashboard=None)
    with serving(AppSettings(root=str(root), **settings), ports, quiet=True, num_cpus=16):
        yield ServedRoot(f"http://{HOST}:{ports.http}")


def memory_of(deployment: str) -> dict[str, int]:
    """Bytes that all processes of one deployment have in memory: of their own, and mapped from files."""
    totals = {"RssAnon": 0, "RssFile": 0}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and _title(process).startswith(
            f"ray::ServeReplica:{APPLICATION_NAME}:{deployment}"
        ):
            for line in (process / "status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in totals:
                    totals[name] += 1024 * int(value.split()[0])
    return totals


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _title(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def _body(number: int, max_tokens: int) -> dict[str, Any]:
    return {"prompt": "def f(x):", "mixture": {domain(number): 1.0}, "max_tokens": max_tokens, "ignore_eos": True}
