"""Classification over both wires: which of the given labels answers a prompt."""

from dataclasses import asdict
from typing import Literal

from fastapi import APIRouter
from ray.serve.grpc_util import RayServegRPCContext

from cluster.classification import ClassifyRequest, Normalize, likeliest
from cluster.errors import InvalidInput
from cluster.messages import ClientRequest
from deployments.api import openapi
from deployments.api.gateway import Classification, Gateway
from deployments.api.grpc_api import errors_to, model_of, prompt_of, routing_of
from deployments.api.openai_answers import Json
from deployments.api.openai_messages import RouteBody
from deployments.api.routing_json import routing_json
from deployments.protos import zephyra_pb2 as pb

_NORMALIZE = {
    pb.NORMALIZE_UNSPECIFIED: Normalize.SUM,
    pb.NORMALIZE_SUM: Normalize.SUM,
    pb.NORMALIZE_LENGTH: Normalize.LENGTH,
}


class ClassifyBody(RouteBody):
    """The body of POST /v1/classify: a prompt or messages, and the labels to choose from."""

    labels: list[str]
    """1 to 64, distinct, each as the model would have to write it."""
    model: str = "zephyra"
    """`zephyra` (the router decides), `zephyra:<domain>`, or `base`."""
    mixture: dict[str, float] | None = None
    """Weights by `domain` or `domain@version`. Overrides `model`; empty for the plain base."""
    normalize: Literal["sum", "length"] | None = None
    """Compare labels by their log-probabilities, `sum`, the default, or by the mean per token, `length`."""
    priority: int | None = None
    """Lower goes first."""
    timeout_s: float | None = None
    """Give up, with status 504, when not all labels are scored by then."""

    def classify_request(self) -> ClassifyRequest:
        """This request in our own words. Raises `InvalidInput` for a value out of its range."""
        priority, timeout_s = self.priority or 0, self.timeout_s
        asked = ClientRequest(self.translate(), self.model, self.mixture, priority=priority, timeout_s=timeout_s)
        return ClassifyRequest(asked, tuple(self.labels), Normalize(self.normalize or "sum"))


def classify_routes(gateway: Gateway) -> APIRouter:
    """POST /v1/classify."""
    routes = APIRouter()

    @routes.post("/v1/classify", response_model=None, responses=openapi.GENERATION)
    async def classify(body: ClassifyBody) -> Json:
        """Score labels as answers to a prompt, through the adapters that the router, `model` or `mixture` chooses."""
        return _answer_json(await gateway.classify(body.classify_request()), body.model)

    return routes


async def classify(gateway: Gateway, request: pb.ClassifyRequest, context: RayServegRPCContext) -> pb.Classification:
    """zephyra.v1.Zephyra/Classify"""
    with errors_to(context):
        found = await gateway.classify(classify_request(request))
        return pb.Classification(
            label=likeliest(found.scores).label,
            scores=[pb.LabelScore(**asdict(score)) for score in found.scores],
            routing=routing_of(found.routing),
            prompt_tokens=found.prompt_tokens,
        )


def classify_request(request: pb.ClassifyRequest) -> ClassifyRequest:
    """The request in our own words. Raises `InvalidInput` for a value that cannot be."""
    if request.normalize not in _NORMALIZE:
        raise InvalidInput(f"normalize is {request.normalize}; expected NORMALIZE_SUM or NORMALIZE_LENGTH.")
    model, mixture = model_of(request)
    asked = ClientRequest(
        prompt_of(request),
        model,
        mixture,
        priority=request.priority,
        timeout_s=request.timeout_s if request.HasField("timeout_s") else None,
    )
    return ClassifyRequest(asked, tuple(request.labels), _NORMALIZE[request.normalize])


def _answer_json(found: Classification, model: str) -> Json:
    return {
        "object": "classification",
        "model": model,
        "label": likeliest(found.scores).label,
        "scores": [asdict(score) for score in found.scores],
        "usage": {"prompt_tokens": found.prompt_tokens},
        "zephyra": routing_json(found.routing),
    }
