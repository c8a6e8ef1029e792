"""What serving adds to the engine: a request for one token of the plain base, over HTTP and over gRPC, beside the
engine alone in this process and beside a deployment of Ray's that does nothing, over the same proxies.

    python -m benchmarks.wire_latency --root artifacts/starter

The five are asked in turn, so that whatever else the machine does is felt by all of them alike.
"""

import argparse
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import torch
from ray import serve
from rich.console import Console
from rich.table import Table
from starlette.requests import Request

from benchmarks.figures import Measurement, percentile
from benchmarks.report import result_line
from benchmarks.served_system import ServedSystem, served_system
from cluster.config.serving import AppSettings
from cluster.engine.engine import Engine
from cluster.messages import GenerateRequest, Mixture, SamplingParams
from cluster.model.base import load_base
from deployments.application import APPLICATION_NAME
from deployments.protos import zephyra_pb2 as pb
from deployments.protos.zephyra_pb2_grpc import ZephyraStub
from deployments.replica.base_folder import base_folder

PROMPT = "What is the capital of France?"
_WARM_UP = 20
_IDLE = "idle"

Ask = Callable[[], object]


class Idle:
    """Ray's own no-op: an answer that is there already."""

    async def __call__(self, _: Request) -> str:
        """Over HTTP."""
        return ""

    async def Route(self, _: pb.RouteRequest) -> pb.Routing:  # noqa: N802 a method of the proto that proxies know
        """Over gRPC."""
        return pb.Routing()


def engine_alone(root: Path) -> Ask:
    """The same request, given to an engine of this process."""
    base = load_base(base_folder(AppSettings(root=str(root))), torch.float32, "cpu")
    engine = Engine(base, AppSettings().engine)

    def ask() -> None:
        engine.submit(GenerateRequest(uuid.uuid4().hex, PROMPT, Mixture(), SamplingParams(max_tokens=1)))
        while engine.has_work:
            engine.step()

    return ask


def over_http(client: httpx.Client) -> dict[str, Ask]:
    """Our request and Ray's no-op."""
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 1}
    return {
        "http": lambda: client.post("/v1/completions", json=body).raise_for_status(),
        "ray_http": lambda: client.post(f"/{_IDLE}", json=body).raise_for_status(),
    }


def over_grpc(channel: grpc.Channel) -> dict[str, Ask]:
    """Our request and Ray's no-op."""
    make_stub: Any = ZephyraStub  # generated, untyped
    stub = make_stub(channel)
    request = pb.GenerateRequest(prompt=PROMPT, base=pb.Base(), sampling=pb.Sampling(max_tokens=1))
    ours, idle = (("application", APPLICATION_NAME),), (("application", _IDLE),)
    return {
        "grpc": lambda: stub.Complete(request, metadata=ours),
        "ray_grpc": lambda: stub.Route(pb.RouteRequest(prompt=PROMPT), metadata=idle),
    }


def timed_in_turn(asks: Mapping[str, Ask], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, `rounds` of all of them one after the other."""
    taken: dict[str, list[float]] = {name: [] for name in asks}
    for _ in range(rounds + _WARM_UP):
        for name, ask in asks.items():
            start_s = time.perf_counter()
            ask()
            taken[name].append((time.perf_counter() - start_s) * 1000)
    return {name: all_ms[_WARM_UP:] for name, all_ms in taken.items()}


def measure(root: Path, system: ServedSystem, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of all five, by name."""
    idle = serve.deployment(name="Idle", ray_actor_options={"num_cpus": 0.1})(Idle)
    serve.run(idle.bind(), name=_IDLE, route_prefix=f"/{_IDLE}")
    with httpx.Client(base_url=system.http, timeout=60) as client, grpc.insecure_channel(system.grpc) as channel:
        asks = {"engine": engine_alone(root), **over_http(client), **over_grpc(channel)}
        return timed_in_turn(asks, rounds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire_latency", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="a trained system")
    parser.add_argument("--rounds", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with served_system(options.root.resolve()) as system:
        taken = measure(options.root.resolve(), system, options.rounds)
    table = Table("", "p50, ms", "p99, ms", title="one token of the base")
    for name, all_ms in taken.items():
        table.add_row(name, f"{percentile(all_ms, 0.5):.2f}", f"{percentile(all_ms, 0.99):.2f}")
    Console().print(table)
    p50 = {name: percentile(all_ms, 0.5) for name, all_ms in taken.items()}
    figures = {
        "engine_p50_ms": p50["engine"],
        "added_http_p50_ms": p50["http"] - p50["engine"],
        "ray_http_p50_ms": p50["ray_http"],
        "added_grpc_p50_ms": p50["grpc"] - p50["engine"],
        "ray_grpc_p50_ms": p50["ray_grpc"],
    }
    print(result_line({name: Measurement((value,)) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
