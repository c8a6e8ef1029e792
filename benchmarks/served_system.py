"""A trained root served on this machine, with its dashboard and its metrics: what commands on whole systems share."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray

from benchmarks.adapters_cluster import free_port
from cluster.config.serving import AppSettings
from deployments.application import APPLICATION_NAME
from deployments.cluster import HOST, Ports, serving


@dataclass(frozen=True, slots=True)
class ServedSystem:
    """Where it listens."""

    http: str
    grpc: str
    dashboard: str
    metrics: tuple[str, ...]
    """Of each node, in Prometheus' text format."""

    def num_running(self, deployment: str) -> int:
        """Replicas that run, as the dashboard's Serve view says."""
        content = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=30).json()
        replicas = content["applications"][APPLICATION_NAME]["deployments"][deployment]["replicas"]
        return sum(replica["state"] == "RUNNING" for replica in replicas)


@contextmanager
def served_system(root: Path, **settings: Any) -> Iterator[ServedSystem]:
    """Serve `root` for as long as the context lasts."""
    # Ray's dashboard asks for a token otherwise.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ports = Ports(http=free_port(), grpc=free_port(), dashboard=free_port())
    with serving(AppSettings(root=str(root), **settings), ports, quiet=True, num_cpus=16):
        nodes: Callable[[], list[dict[str, Any]]] = ray.nodes  # Ray leaves it untyped
        metrics = tuple(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes())
        yield ServedSystem(
            f"http://{HOST}:{ports.http}", f"{HOST}:{ports.grpc}", f"http://{HOST}:{ports.dashboard}", metrics
        )
