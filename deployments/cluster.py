"""Starts Ray on this machine, serves Zephyra on it, and stops it again: what `zephyra serve` and the tests run."""

import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

from cluster.config import AppSettings, put_first_on_path, set_environment
from cluster.errors import PortTaken
from deployments.application import APPLICATION_NAME, build

HOST = "127.0.0.1"
_stop_serve: Callable[[], None] = serve.shutdown  # Ray leaves it untyped
MAX_GRPC_BYTES = 64 * 2**20
"""Of a message to Serve's proxy, decompressed, or from it; holds sixteen long answers with log-probabilities."""
SERVICER = "deployments.protos.zephyra_pb2_grpc.add_ZephyraServicer_to_server"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a local cluster listens."""

    http: int = 8000
    grpc: int = 9000
    dashboard: int | None = 8265
    """None for no dashboard."""

    def check_free(self) -> None:
        """Raise `PortTaken` if another process listens on one of them."""
        for port, option in ((self.http, "--port"), (self.grpc, "--grpc-port"), (self.dashboard, "--dashboard-port")):
            if port is not None and not _is_free(port):
                raise PortTaken(f"Port {port} is taken by another process; stop it or pass {option}.")


@contextmanager
def serving(settings: AppSettings, ports: Ports, quiet: bool = False, num_cpus: int | None = None) -> Iterator[None]:
    """Zephyra, served for as long as the context lasts. Raises `NotTrained` or `PortTaken` before Ray is started.

    `quiet` keeps the processes' logs in Ray's folder instead of printing them here. `num_cpus` is what Ray is to count
    on instead of the machine's cores: it counts, and holds nobody to it.
    """
    application = build(settings)
    ports.check_free()
    # A job's `python` is looked up on the cluster's path: it should be this one, which has the packages.
    put_first_on_path(Path(sys.executable).parent)
    # Read by the proxy's process, which would take messages of 2 GiB otherwise.
    set_environment("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", str(MAX_GRPC_BYTES))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=ports.dashboard is not None,
        dashboard_host=HOST,
        dashboard_port=ports.dashboard,
        log_to_driver=not quiet,
        logging_level=logging.WARNING if quiet else logging.INFO,
    )
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=HOST, port=ports.http),
            grpc_options=gRPCOptions(port=ports.grpc, grpc_servicer_functions=[SERVICER]),
        )
        serve.run(application, name=APPLICATION_NAME, route_prefix="/")
        yield
    finally:
        _stop_serve()
        ray.shutdown()


def wait_forever() -> None:
    """Sleep until the process is interrupted or told to end: `KeyboardInterrupt` either way."""
    # Also where a shell started it in the background with interrupts ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    while True:
        time.sleep(3600)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a connection of the last one that is still closing does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
