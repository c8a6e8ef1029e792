"""Both wires over deployments in this process: HTTP as ASGI, gRPC through a real port, as Serve's proxy passes it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

from deployments.api import domains_grpc, feedback, grpc_api
from deployments.api.gateway import Gateway
from deployments.api.openai_api import build_api
from deployments.domains.remote_domains import RemoteDomains
from deployments.protos.zephyra_pb2_grpc import ZephyraServicer, ZephyraStub, add_ZephyraServicer_to_server


@dataclass(frozen=True)
class Wires:
    """Clients of one system."""

    http: httpx.AsyncClient
    grpc: ZephyraStub


@asynccontextmanager
async def wires(gateway: Gateway, domains: RemoteDomains) -> AsyncIterator[Wires]:
    """Clients of `gateway` and `domains`, on this machine."""
    api = build_api(gateway, domains)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False, client=("127.0.0.1", 5000))
    server = grpc.aio.server()
    add_ZephyraServicer_to_server(_servicer(gateway, domains), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            yield Wires(client, ZephyraStub(channel))
    finally:
        await server.stop(None)


def _servicer(gateway: Gateway, domains: RemoteDomains) -> ZephyraServicer:
    servicer = ZephyraServicer()
    servicer.Complete = _passed_on(grpc_api.complete, gateway)
    servicer.Route = _passed_on(grpc_api.route, gateway)
    servicer.Feedback = _passed_on(feedback.feedback, gateway)
    servicer.ListDomains = _passed_on(domains_grpc.list_domains, domains)
    servicer.GetDomain = _passed_on(domains_grpc.get_domain, domains)
    servicer.RemoveDomain = _passed_on(domains_grpc.remove_domain, domains)
    servicer.RollbackDomain = _passed_on(domains_grpc.rollback_domain, domains)
    servicer.AddDomain = _passed_on(_add_domain, domains)
    return servicer


async def _add_domain(domains: RemoteDomains, requests: Any, context: RayServegRPCContext) -> Any:
    return await domains_grpc.add_domain(domains, gRPCInputStream(requests), context)


def _passed_on(call: Callable[..., Any], behind: Gateway | RemoteDomains) -> Callable[..., Any]:
    """`call` as a method of a servicer: Serve's proxy gives it a context of its own and ends the call by that."""

    async def passed_on(request: Any, context: Any) -> Any:
        own = RayServegRPCContext(context)
        try:
            return await call(behind, request, own)
        except Exception:
            await context.abort(own.code(), own.details())

    return passed_on
