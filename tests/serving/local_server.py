"""The HTTP application behind a real port, as Serve's proxy listens on one: uvicorn, in a thread of this process."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from cluster.config.serving import AppSettings
from deployments.api.access import Access
from deployments.api.gateway import Gateway
from deployments.api.openai_api import build_api
from deployments.domains.publisher import Publisher
from deployments.domains.remote_domains import RemoteDomains
from deployments.replica.base_replica import BaseReplica
from deployments.router import Router
from tests.nano import DOMAINS
from tests.serving.local import LocalHandle, local_system


@asynccontextmanager
async def whole_system(root: Path, **settings: Any) -> AsyncIterator[tuple[ASGIApp, BaseReplica]]:
    """Every deployment over a root that has a router, all of them the real ones, and the application before them."""
    given = AppSettings(root=str(root), **settings)
    system = local_system(root, DOMAINS)
    gateway = Gateway(LocalHandle(Router(root)), LocalHandle(system.replica), root)
    try:
        domains = RemoteDomains(LocalHandle(Publisher(given)), given)
        yield build_api(gateway, domains, Access()), system.replica
    finally:
        system.replica.engine.stop()


@contextmanager
def listening(
    system: Callable[[], AbstractAsyncContextManager[tuple[ASGIApp, BaseReplica]]],
) -> Iterator[tuple[str, int, BaseReplica]]:
    """Host, port, and the replica that answers. `system` is entered in the event loop that serves it."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    replicas: list[BaseReplica] = []
    servers: list[uvicorn.Server] = []
    is_up = threading.Event()

    async def serve() -> None:
        async with system() as (app, replica):
            # As Serve's proxy sets it up.
            server = uvicorn.Server(uvicorn.Config(app, lifespan="off", access_log=False, log_config=None))
            replicas.append(replica)
            servers.append(server)
            listener.listen()
            is_up.set()
            await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert is_up.wait(60)
        yield *listener.getsockname(), replicas[0]
    finally:
        for server in servers:
            server.should_exit = server.force_exit = True
        thread.join()
