"""The Gateway as Serve calls it: one method per gRPC call, named as in the proto, and the HTTP application."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import FastAPI
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

from cluster.config.serving import AppSettings
from deployments import calls
from deployments.api import classify, domains_grpc, feedback, grpc_api
from deployments.api.access import CALL_ROLES, access_of
from deployments.api.gateway import Gateway
from deployments.api.openai_api import build_api
from deployments.domains.remote_domains import RemoteDomains
from deployments.protos import zephyra_pb2 as pb
from deployments.router import Router


class Ingress(Gateway):
    """A Gateway with both its wires. Serve finds the methods, and `grpc_context`, by their names."""

    def __init__(
        self, router: calls.Handle, replica: calls.Handle, publisher: calls.Handle, settings: AppSettings
    ) -> None:
        root = settings.resolved_root()
        super().__init__(router, replica, root, own_router=Router(root))
        self._domains = RemoteDomains(publisher, settings)
        self._access = access_of(settings)
        self._probing = self.prober.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self, self._domains, self._access)

    def _admit(self, context: RayServegRPCContext, method: str) -> None:
        """Raise what `Access.check_call` does of a caller of `method`, and put it into the call's status."""
        with grpc_api.errors_to(context):
            self._access.check_call(context, CALL_ROLES[method])

    async def Generate(  # noqa: N802 the proto's name
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """zephyra.v1.Zephyra/Generate"""
        self._admit(grpc_context, "Generate")
        async with aclosing(grpc_api.generate(self, request, grpc_context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Complete(  # noqa: N802 the proto's name
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.Completion:
        """zephyra.v1.Zephyra/Complete"""
        self._admit(grpc_context, "Complete")
        return await grpc_api.complete(self, request, grpc_context)

    async def Route(  # noqa: N802 the proto's name
        self, request: pb.RouteRequest, grpc_context: RayServegRPCContext
    ) -> pb.Routing:
        """zephyra.v1.Zephyra/Route"""
        self._admit(grpc_context, "Route")
        return await grpc_api.route(self, request, grpc_context)

    async def Classify(  # noqa: N802 the proto's name
        self, request: pb.ClassifyRequest, grpc_context: RayServegRPCContext
    ) -> pb.Classification:
        """zephyra.v1.Zephyra/Classify"""
        self._admit(grpc_context, "Classify")
        return await classify.classify(self, request, grpc_context)

    async def ListDomains(  # noqa: N802 the proto's name
        self, request: pb.ListDomainsRequest, grpc_context: RayServegRPCContext
    ) -> pb.DomainPage:
        """zephyra.v1.Zephyra/ListDomains"""
        self._admit(grpc_context, "ListDomains")
        return await domains_grpc.list_domains(self._domains, request, grpc_context)

    async def GetDomain(  # noqa: N802 the proto's name
        self, request: pb.GetDomainRequest, grpc_context: RayServegRPCContext
    ) -> pb.DomainHistory:
        """zephyra.v1.Zephyra/GetDomain"""
        self._admit(grpc_context, "GetDomain")
        return await domains_grpc.get_domain(self._domains, request, grpc_context)

    async def AddDomain(  # noqa: N802 the proto's name
        self, requests: gRPCInputStream[pb.AddDomainRequest], grpc_context: RayServegRPCContext
    ) -> pb.DomainChange:
        """zephyra.v1.Zephyra/AddDomain"""
        self._admit(grpc_context, "AddDomain")
        return await domains_grpc.add_domain(self._domains, requests, grpc_context)

    async def RemoveDomain(  # noqa: N802 the proto's name
        self, request: pb.RemoveDomainRequest, grpc_context: RayServegRPCContext
    ) -> pb.DomainChange:
        """zephyra.v1.Zephyra/RemoveDomain"""
        self._admit(grpc_context, "RemoveDomain")
        return await domains_grpc.remove_domain(self._domains, request, grpc_context)

    async def RollbackDomain(  # noqa: N802 the proto's name
        self, request: pb.RollbackDomainRequest, grpc_context: RayServegRPCContext
    ) -> pb.DomainChange:
        """zephyra.v1.Zephyra/RollbackDomain"""
        self._admit(grpc_context, "RollbackDomain")
        return await domains_grpc.rollback_domain(self._domains, request, grpc_context)

    async def Feedback(  # noqa: N802 the proto's name
        self, request: pb.FeedbackRequest, grpc_context: RayServegRPCContext
    ) -> pb.FeedbackReply:
        """zephyra.v1.Zephyra/Feedback"""
        self._admit(grpc_context, "Feedback")
        return await feedback.feedback(self, request, grpc_context)
