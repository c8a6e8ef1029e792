"""The gRPC wire, `zephyra.v1.Zephyra`. Translates to and from messages, nothing else."""

import logging
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict

import grpc
from ray.serve.grpc_util import RayServegRPCContext

from cluster.errors import InvalidInput, InvalidMixture, ZephyraError
from cluster.messages import (
    ChatMessage,
    ClientRequest,
    FinishReason,
    Mixture,
    Prompt,
    Role,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
)
from deployments.api.gateway import BASE_MODEL, ROUTED_MODEL, Gateway, Routing
from deployments.api.status import message_of, status_of
from deployments.protos import zephyra_pb2 as pb

logger = logging.getLogger("ray.serve")

_ROLES = {
    pb.Message.ROLE_SYSTEM: Role.SYSTEM,
    pb.Message.ROLE_USER: Role.USER,
    pb.Message.ROLE_ASSISTANT: Role.ASSISTANT,
}
_OPTIONAL_SAMPLING_FIELDS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
)
"""Named in the proto as in `SamplingParams`."""
_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


async def generate(
    gateway: Gateway, request: pb.GenerateRequest, context: RayServegRPCContext
) -> AsyncGenerator[pb.GenerateChunk, None]:
    """The answer as it is made: routing on the first chunk, usage on the last."""
    with errors_to(context):
        asked = client_request(request)
        answer = await gateway.answer(asked)
        completion_tokens, num_open = 0, asked.num_choices
        routing: pb.Routing | None = routing_of(answer.routing)
        async with aclosing(answer):
            async for piece in answer.pieces():
                chunk = piece.chunk
                completion_tokens += len(chunk.token_ids)
                num_open -= chunk.finish_reason is not None
                yield pb.GenerateChunk(
                    index=piece.index,
                    token_ids=chunk.token_ids,
                    text=chunk.text,
                    finish_reason=_FINISH_REASONS[chunk.finish_reason],
                    logprobs=map(_token_logprob, chunk.logprobs),
                    routing=routing,
                    usage=None if num_open else _usage(chunk, completion_tokens),
                )
                routing = None


async def complete(gateway: Gateway, request: pb.GenerateRequest, context: RayServegRPCContext) -> pb.Completion:
    """The whole answer."""
    with errors_to(context):
        asked = client_request(request)
        answer = await gateway.answer(asked)
        chunks: list[list[TokenChunk]] = [[] for _ in range(asked.num_choices)]
        async with aclosing(answer):
            async for piece in answer.pieces():
                chunks[piece.index].append(piece.chunk)
        choices = [_choice(of_one) for of_one in chunks]
        usage = _usage(chunks[0][-1], sum(len(choice.token_ids) for choice in choices))
        return pb.Completion(choices=choices, routing=routing_of(answer.routing), usage=usage)


async def route(gateway: Gateway, request: pb.RouteRequest, context: RayServegRPCContext) -> pb.Routing:
    """Which domains the router would answer with."""
    with errors_to(context):
        return routing_of(await gateway.route(prompt_of(request)))


def client_request(request: pb.GenerateRequest) -> ClientRequest:
    """The request in our own words. Raises `InvalidInput` for a value that cannot be."""
    model, mixture = model_of(request)
    return ClientRequest(
        prompt_of(request),
        model,
        mixture,
        _sampling(request.sampling),
        num_choices=request.n if request.HasField("n") else 1,
        priority=request.priority,
        timeout_s=request.timeout_s if request.HasField("timeout_s") else None,
    )


def model_of(request: pb.GenerateRequest | pb.ClassifyRequest) -> tuple[str, dict[str, float] | None]:
    """Who answers: model and mixture as in `ClientRequest`. Raises `InvalidMixture` for an adapter named twice."""
    match request.WhichOneof("model"):
        case "mixture":
            return ROUTED_MODEL, _weights(request.mixture)
        case "domain":
            return f"{ROUTED_MODEL}:{request.domain}", None
        case "base":
            return BASE_MODEL, None
        case _:
            return ROUTED_MODEL, None


def prompt_of(request: pb.GenerateRequest | pb.RouteRequest | pb.ClassifyRequest) -> Prompt:
    """What is asked. Raises `InvalidInput` for a message whose role is not given."""
    if request.WhichOneof("prompt_kind") != "chat":
        return request.prompt
    turns = []
    for message in request.chat.messages:
        if message.role not in _ROLES:
            raise InvalidInput(f"The role of a message is {message.role}; expected system, user or assistant.")
        turns.append(ChatMessage(_ROLES[message.role], message.content))
    return tuple(turns)


def _sampling(sampling: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        ignore_eos=sampling.ignore_eos,
        **{name: getattr(sampling, name) for name in _OPTIONAL_SAMPLING_FIELDS if sampling.HasField(name)},
    )


def _weights(mixture: pb.Mixture) -> dict[str, float]:
    weights: dict[str, float] = {}
    for entry in mixture.entries:
        name = f"{entry.domain}@{entry.version}" if entry.HasField("version") else entry.domain
        if name in weights:
            raise InvalidMixture(f"The mixture names {name} twice; give each adapter one weight.")
        weights[name] = entry.weight
    return weights


def routing_of(routing: Routing) -> pb.Routing:
    """A routing as the wire says it."""
    return pb.Routing(
        mixture=_mixture(routing.mixture),
        probabilities=routing.probabilities,
        routing_ms=routing.routing_ms,
        request_id=routing.request_id,
        merged=None if routing.merged is None else pb.Merged(**asdict(routing.merged)),
    )


def _mixture(mixture: Mixture) -> pb.Mixture:
    return pb.Mixture(
        entries=[
            pb.MixtureEntry(domain=ref.domain, version=ref.version, weight=weight) for ref, weight in mixture.entries
        ]
    )


def _choice(chunks: list[TokenChunk]) -> pb.Choice:
    return pb.Choice(
        token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
        text="".join(chunk.text for chunk in chunks),
        finish_reason=_FINISH_REASONS[chunks[-1].finish_reason],
        logprobs=[_token_logprob(token) for chunk in chunks for token in chunk.logprobs],
    )


def _token_logprob(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token.token_id,
        logprob=token.logprob,
        text=token.text,
        text_bytes=token.text_bytes,
        top=map(_token_logprob, token.top),
    )


def _usage(last: TokenChunk, completion_tokens: int) -> pb.Usage:
    return pb.Usage(prompt_tokens=last.prompt_tokens, completion_tokens=completion_tokens)


@contextmanager
def errors_to(context: RayServegRPCContext) -> Iterator[None]:
    """Put what goes wrong into the call's status. Without a code set, Serve would send the traceback."""
    try:
        yield
    except ZephyraError as error:
        context.set_code(status_of(error).grpc)
        context.set_details(message_of(error))
        raise
    except Exception:
        request_id = context.request_id() or uuid.uuid4().hex
        logger.exception("Request %s failed.", request_id)
        context.set_code(grpc.StatusCode.INTERNAL)
        context.set_details(f"Internal error in request {request_id}; it has been logged.")
        raise
