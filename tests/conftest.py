"""What every test may use: the environment Ray needs, a nano root, and one real cluster for the whole session."""

import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.config.serving import AppSettings
from cluster.environment import GrpcTls, told_of_tls
from tests.nano import build_root

# Before anything imports Ray: local clusters ask for a token otherwise, and report their use.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# So that the test of autoscaling need not wait for Serve to hear of a load.
os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"
# So that the test of what Ray exports need not wait ten seconds for it.
os.environ["RAY_metrics_report_interval_ms"] = "2000"  # noqa: SIM112 (Ray reads it so)
# So that jobs of a few steps do not wait for Ray Train to look at them, which it does every two seconds.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only for tests; one that publishes takes `own_root`."""
    return build_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    return build_root(tmp_path / "root")


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    # Here, so that only tests of buckets pay for the import.
    from tests.bucket import emulated_s3

    with emulated_s3() as environment:
        yield environment


@pytest.fixture
def s3_root(s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty root in a bucket, with a cache of its own."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"s3://zephyra/{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Served:
    """Where the shared cluster listens, and the root it serves."""

    root: Path
    http: str
    grpc: str
    grpc_tls: GrpcTls


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Zephyra on a real Ray cluster, started once; its root is its own, since tests publish to it.

    Each adapter has one copy, so that a test sees what it is like when that is gone.
    """
    # Here, so that tests without a cluster do not pay for importing Ray.
    from deployments.cluster import Ports, serving
    from tests.serving.certificates import write_certificate

    root = build_root(tmp_path_factory.mktemp("served"))
    ports = Ports(http=free_port(), grpc=free_port(), dashboard=None)
    settings = AppSettings(root=str(root), threads=1, replicas=2, copies=1)
    cert, key = write_certificate(tmp_path_factory.mktemp("tls"))
    grpc_tls = GrpcTls(cert, key, f"127.0.0.1:{free_port()}")
    with told_of_tls(grpc_tls), serving(settings, ports, quiet=True, num_cpus=16):
        yield Served(root, f"http://127.0.0.1:{ports.http}", f"127.0.0.1:{ports.grpc}", grpc_tls)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=250, help="requests that tests/serving/test_fuzz.py sends")
    parser.addoption("--starter", type=Path, help="where to train the starter, or to find it trained; else forgotten")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first, while the starter is trained; then those on it; then the clusters', one after the other.

    Of several processes the first trains at once, and the others have begun with the fast tests.
    """
    has_peers = hasattr(config, "workerinput")

    def rank(item: pytest.Item) -> int:
        on_starter = item.get_closest_marker("starter") is not None
        if item.get_closest_marker("ray") is not None:
            return 3 if on_starter else 4
        if on_starter:
            return 0 if has_peers else 2
        return 1

    items.sort(key=rank)
