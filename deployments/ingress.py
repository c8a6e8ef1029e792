"""The Gateway as Serve calls it: one method per gRPC call, named as in the proto, and the HTTP application."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import FastAPI
from ray.serve.grpc_util import RayServegRPCContext

from deployments import grpc_api
from deployments.gateway import Gateway
from deployments.openai_api import build_api
from deployments.protos import zephyra_pb2 as pb


class Ingress(Gateway):
    """A Gateway with both its wires. Serve finds the methods, and `grpc_context`, by their names."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self)

    async def Generate(  # noqa: N802 the proto's name
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """zephyra.v1.Zephyra/Generate"""
        async with aclosing(grpc_api.generate(self, request, grpc_context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Complete(  # noqa: N802 the proto's name
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.Completion:
        """zephyra.v1.Zephyra/Complete"""
        return await grpc_api.complete(self, request, grpc_context)

    async def Route(  # noqa: N802 the proto's name
        self, request: pb.RouteRequest, grpc_context: RayServegRPCContext
    ) -> pb.Routing:
        """zephyra.v1.Zephyra/Route"""
        return await grpc_api.route(self, request, grpc_context)
