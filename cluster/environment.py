"""The environment of this process: the only place that reads it, or writes it for processes that are started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.config.places import absolute
from cluster.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class GrpcTls:
    """A port on which gRPC is served over TLS, beside the plain one."""

    cert: Path
    key: Path
    """PEM files."""
    address: str
    """host:port; by default port 9443 of all interfaces."""


def ray_address() -> str | None:
    """Where `ray job submit` said the cluster is; None outside a job."""
    return os.environ.get("RAY_ADDRESS")


_TLS_CERT, _TLS_KEY, _TLS_ADDRESS = "ZEPHYRA_TLS_CERT", "ZEPHYRA_TLS_KEY", "ZEPHYRA_GRPC_TLS_ADDRESS"


def grpc_tls() -> GrpcTls | None:
    """What Ray was started with: its proxy reads no settings of ours. Raises `InvalidInput` for one file of the two."""
    cert, key = (os.environ.get(name) or None for name in (_TLS_CERT, _TLS_KEY))
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        given, missing = (_TLS_CERT, _TLS_KEY) if key is None else (_TLS_KEY, _TLS_CERT)
        raise InvalidInput(f"{given} is set and {missing} is not; set both, or neither to have no TLS.")
    return GrpcTls(absolute(cert), absolute(key), os.environ.get(_TLS_ADDRESS) or "[::]:9443")


@contextmanager
def told_of_tls(tls: GrpcTls | None) -> Iterator[None]:
    """Let processes that are started meanwhile find `tls`; without one, what they would find anyway."""
    before = dict(os.environ)
    if tls is not None:
        os.environ.update({_TLS_CERT: str(tls.cert), _TLS_KEY: str(tls.key), _TLS_ADDRESS: tls.address})
    try:
        yield
    finally:
        for name in (_TLS_CERT, _TLS_KEY, _TLS_ADDRESS):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def cache_folder() -> Path:
    """Where what was built for this machine is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zephyra"


def set_environment(name: str, value: str) -> None:
    """Let this process and those it starts have `name` as `value`, unless it is set already."""
    os.environ.setdefault(name, value)


def put_first_on_path(folder: Path) -> None:
    """Let this process and those it starts look for programs in `folder` first."""
    os.environ["PATH"] = os.pathsep.join((str(folder), os.environ.get("PATH", "")))
