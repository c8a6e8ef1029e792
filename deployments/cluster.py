"""Starts Ray on this machine, serves Zephyra on it, and stops it again: what `zephyra serve` and the tests run."""

import errno
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

from cluster.config.serving import AppSettings
from cluster.environment import GrpcTls, put_first_on_path, told_of_tls
from cluster.errors import InvalidInput, PortTaken
from deployments.api.grpc_service import check_certificate
from deployments.api.keys import read_keys
from deployments.api.loopback import is_local

HOST = "127.0.0.1"
_stop_serve: Callable[[], None] = serve.shutdown  # Ray leaves it untyped
SERVICER = "deployments.api.grpc_service.add_service"


@dataclass(frozen=True, slots=True)
class Tls:
    """A certificate for HTTP, and for a second gRPC port: Ray's own knows no TLS."""

    cert: Path
    key: Path
    """PEM files."""
    grpc_port: int = 9443


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a local cluster listens."""

    http: int = 8000
    grpc: int = 9000
    dashboard: int | None = 8265
    """None for no dashboard."""
    host: str = HOST
    """An address of this machine, or 0.0.0.0 or :: for all of them; the dashboard's is always 127.0.0.1."""
    tls: Tls | None = None

    def check_free(self) -> None:
        """Raise `PortTaken` if another process listens on one of them."""
        for host, port, option in (
            (self.host, self.http, "--port"),
            (self.host, None if self.tls is None else self.tls.grpc_port, "--grpc-tls-port"),
            (HOST, self.grpc, "--grpc-port"),
            (HOST, self.dashboard, "--dashboard-port"),
        ):
            if port is not None and not _is_free(host, port):
                raise PortTaken(f"Port {port} is taken by another process; stop it or pass {option}.")

    def http_options(self) -> HTTPOptions:
        """For Serve's proxy."""
        return HTTPOptions(
            host=self.host,
            port=self.http,
            ssl_keyfile=None if self.tls is None else str(self.tls.key),
            ssl_certfile=None if self.tls is None else str(self.tls.cert),
        )

    def grpc_tls(self) -> GrpcTls | None:
        """For `add_service`, in the same process."""
        if self.tls is None:
            return None
        host = f"[{self.host}]" if ":" in self.host else self.host
        return GrpcTls(self.tls.cert, self.tls.key, f"{host}:{self.tls.grpc_port}")

    def check_open_to(self, settings: AppSettings) -> None:
        """Raise `InvalidInput` where others would be let in without keys, or where keys or a certificate are none."""
        if not is_local(self.host) and settings.keys_file is None and not settings.insecure:
            raise InvalidInput(
                f"--host {self.host} lets other machines in, and there are no keys; make one with `zephyra keys add "
                "NAME` and pass --keys-file, or pass --insecure to answer anybody."
            )
        if (keys_file := settings.resolved_keys_file()) is not None:
            read_keys(keys_file)
        if self.tls is not None:
            check_certificate(self.tls.cert, self.tls.key)


@contextmanager
def serving(settings: AppSettings, ports: Ports, quiet: bool = False, num_cpus: int | None = None) -> Iterator[None]:
    """Zephyra, served for as long as the context lasts. Raises before Ray is started: `NotTrained`, `PortTaken`, or
    `InvalidInput` where other machines would be let in without keys.

    Over gRPC other machines are served on the port with TLS; on Ray's plain one, which is open on all interfaces
    whatever the host, only without TLS and with a host that is not this machine's own.
    `quiet` keeps the processes' logs in Ray's folder instead of printing them here. `num_cpus` is what Ray is to count
    on instead of the machine's cores: it counts, and holds nobody to it.
    """
    # Here, so that who gives a port that is taken is told at once, and does not wait for torch.
    from deployments.application import APPLICATION_NAME, build

    ports.check_open_to(settings)
    is_plain_local = settings.plain_grpc_local or ports.tls is not None or is_local(ports.host)
    application = build(settings.model_copy(update={"plain_grpc_local": is_plain_local}))
    ports.check_free()
    # A job's `python` is looked up on the cluster's path: it should be this one, which has the packages.
    put_first_on_path(Path(sys.executable).parent)
    with told_of_tls(ports.grpc_tls()):
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
            http_options=ports.http_options(),
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


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: a connection of the last one that is still closing does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise InvalidInput(
                f"--host {host} is no address of this machine ({error.strerror}); give one, or 0.0.0.0 for all."
            ) from error
    return True
