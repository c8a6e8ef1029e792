"""A publisher over a root of its own, and what stands before it, in one process."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from ray.serve.grpc_util import gRPCInputStream

from cluster.config.serving import AppSettings
from deployments.api.access import Access
from deployments.api.gateway import Gateway
from deployments.api.openai_api import build_api
from deployments.domains.publisher import Publisher
from deployments.domains.remote_domains import RemoteDomains
from deployments.protos import zephyra_pb2 as pb
from tests.serving.local import GoneHandle, LocalHandle

UPLOAD_BYTES = 2**20


@dataclass
class System:
    """A publisher over a root of its own, and what stands before it."""

    root: Path
    temp: Path
    publisher: Publisher
    domains: RemoteDomains
    gateway: Gateway

    def client(
        self, peer: str = "127.0.0.1", base_url: str = "http://127.0.0.1", access: Access | None = None
    ) -> httpx.AsyncClient:
        api = build_api(self.gateway, self.domains, access or Access())
        transport = httpx.ASGITransport(api, raise_app_exceptions=False, client=(peer, 5000))
        return httpx.AsyncClient(transport=transport, base_url=base_url)

    def files(self) -> dict[str, bytes]:
        """All that is in the root, and what is left of uploads."""
        return {str(f): f.read_bytes() for top in (self.root, self.temp) for f in top.rglob("*") if f.is_file()}


def make(root: Path, temp: Path, **settings: Any) -> System:
    given = AppSettings(root=str(root), **{"upload_bytes": UPLOAD_BYTES, **settings})
    publisher = Publisher(given)
    domains = RemoteDomains(LocalHandle(publisher), given)
    return System(root, temp, publisher, domains, Gateway(GoneHandle(), GoneHandle(), root))


def stream(messages: list[pb.AddDomainRequest]) -> Any:
    async def sent() -> AsyncIterator[pb.AddDomainRequest]:
        for message in messages:
            yield message

    return gRPCInputStream(sent())
