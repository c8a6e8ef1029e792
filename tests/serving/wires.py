"""Both wires over deployments in this process: HTTP as ASGI, gRPC through a real port, as Serve's proxy passes it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

from deployments.api import classify, domains_grpc, feedback, grpc_api
from deployments.api.access import CALL_ROLES, Access
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
async def wires(
    gateway: Gateway, domains: RemoteDomains, access: Access | None = None, api_key: str = ""
) -> AsyncIterator[Wires]:
    """Clients of `gateway` and `domains`, on this machine, by default without keys."""
    access = access or Access()
    api = build_api(gateway, domains, access)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False, client=("127.0.0.1", 5000))
    server = grpc.aio.server()
    add_ZephyraServicer_to_server(_servicer(gateway, domains, access), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=_bearer(api_key)) as client,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", interceptors=[_WithKey(api_key)]) as channel,
        ):
            yield Wires(client, ZephyraStub(channel))
    finally:
        await server.stop(None)


def _bearer(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


class _WithKey(grpc.aio.UnaryUnaryClientInterceptor):
    """Sends the key along with calls of one message."""

    def __init__(self, api_key: str) -> None:
        self._metadata = tuple(_bearer(api_key).items())

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(details._replace(metadata=(*(details.metadata or ()), *self._metadata)), request)


def _servicer(gateway: Gateway, domains: RemoteDomains, access: Access) -> ZephyraServicer:
    servicer = ZephyraServicer()
    calls = {
        "Complete": (grpc_api.complete, gateway),
        "Route": (grpc_api.route, gateway),
        "Feedback": (feedback.feedback, gateway),
        "Classify": (classify.classify, gateway),
        "ListDomains": (domains_grpc.list_domains, domains),
        "GetDomain": (domains_grpc.get_domain, domains),
        "RemoveDomain": (domains_grpc.remove_domain, domains),
        "RollbackDomain": (domains_grpc.rollback_domain, domains),
        "AddDomain": (_add_domain, domains),
    }
    for name, (call, behind) in calls.items():
        setattr(servicer, name, _passed_on(name, call, behind, access))
    return servicer


async def _add_domain(domains: RemoteDomains, requests: Any, context: RayServegRPCContext) -> Any:
    return await domains_grpc.add_domain(domains, gRPCInputStream(requests), context)


def _passed_on(
    name: str, call: Callable[..., Any], behind: Gateway | RemoteDomains, access: Access
) -> Callable[..., Any]:
    """`call` as a method of a servicer: Serve's proxy gives it a context of its own and ends the call by that."""

    async def passed_on(request: Any, context: Any) -> Any:
        own = RayServegRPCContext(context)
        try:
            with grpc_api.errors_to(own):
                access.check_call(own, CALL_ROLES[name])
            return await call(behind, request, own)
        except Exception:
            await context.abort(own.code(), own.details())

    return passed_on
