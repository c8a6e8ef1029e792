"""Which domain was right, over both wires: what the gauges of live routing accuracy are made of."""

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from ray.serve.grpc_util import RayServegRPCContext

from cluster.messages import NONE_DOMAIN
from deployments.api import openapi
from deployments.api.gateway import Gateway
from deployments.api.grpc_api import errors_to
from deployments.monitoring.accuracy import Judged
from deployments.protos import zephyra_pb2 as pb


class FeedbackBody(BaseModel):
    """The body of POST /v1/feedback."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    request_id: str = Field(min_length=1, max_length=64)
    """As an answer or a routing names it, under `zephyra`."""
    domain: str
    """The right one, or `none`."""


def feedback_routes(gateway: Gateway) -> APIRouter:
    """POST /v1/feedback."""
    routes = APIRouter()

    @routes.post("/v1/feedback", response_model=None, responses=openapi.FEEDBACK)
    async def feedback(body: FeedbackBody) -> dict[str, object]:
        """Say which domain was right for a prompt that the router decided on."""
        judged = _judged(gateway, body.request_id, body.domain)
        return {"routed": judged.decided.domain, "right": judged.is_right}

    return routes


async def feedback(gateway: Gateway, request: pb.FeedbackRequest, context: RayServegRPCContext) -> pb.FeedbackReply:
    """zephyra.v1.Zephyra/Feedback"""
    with errors_to(context):
        judged = _judged(gateway, request.request_id, request.domain)
        return pb.FeedbackReply(routed=judged.decided.domain, right=judged.is_right)


def _judged(gateway: Gateway, request_id: str, domain: str) -> Judged:
    """Raises `UnknownDomain` for a domain that is not there, `UnknownRequest`."""
    right = domain if domain == NONE_DOMAIN else gateway.state.resolve(domain).domain
    return gateway.monitor.feedback(request_id, right)
