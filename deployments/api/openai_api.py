"""The HTTP wire, in OpenAI's shapes. Translates to and from messages, nothing else.

An answer says under `zephyra` which adapters gave it, with which weights and probabilities, and what routing took.
"""

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from ray.exceptions import TaskCancelledError
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from cluster.errors import DeadlineExceeded, InvalidKey, Overloaded, ZephyraError
from deployments.api import openapi
from deployments.api.access import Access
from deployments.api.body_limit import BodyLimit, Refusal
from deployments.api.classify import ClassifyBody, classify_routes
from deployments.api.domains_http import domain_routes
from deployments.api.domains_messages import AddBody, LoadBody, RollbackBody, UnloadBody
from deployments.api.feedback import FeedbackBody, feedback_routes
from deployments.api.gate import Gate
from deployments.api.gateway import Answer, Gateway
from deployments.api.openai_answers import Json, Reply
from deployments.api.openai_messages import ChatBody, CompletionBody, RouteBody, sentence
from deployments.api.routing_json import routing_json
from deployments.api.status import code_of, message_of, status_of
from deployments.domains.remote_domains import RemoteDomains

logger = logging.getLogger("ray.serve")

_HEADERS: Mapping[type[ZephyraError], Mapping[str, str]] = {
    Overloaded: {"retry-after": "1"},
    InvalidKey: {"www-authenticate": "Bearer"},
}
"""What some errors say beside their body."""
_BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/route": RouteBody,
    "/v1/classify": ClassifyBody,
    "/v1/feedback": FeedbackBody,
    "/v1/domains": AddBody,
    "/v1/domains/{name}/rollback": RollbackBody,
    "/v1/load_lora_adapter": LoadBody,
    "/v1/unload_lora_adapter": UnloadBody,
}


_ANSWER: dict[str, Any] = {
    "description": "The whole answer; with `stream`, its pieces as server-sent events.",
    "content": {"text/event-stream": {}},
}


def build_api(gateway: Gateway, domains: RemoteDomains, access: Access) -> FastAPI:
    """The HTTP application in front of `gateway`, and of `domains`, for those whom `access` lets in."""
    api = openapi.DescribedApi(title="Zephyra", description="One endpoint, many experts.")
    api.add_middleware(BodyLimit, upload_bytes=domains.upload_bytes, refusal=_error_response)
    # The last one added comes first.
    api.add_middleware(Gate, access=access, refusal=_error_response)
    api.add_exception_handler(RequestValidationError, _on_invalid_body)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(ZephyraError, _on_zephyra_error)
    api.add_exception_handler(Exception, _on_unexpected)
    api.include_router(domain_routes(domains, access))
    api.include_router(feedback_routes(gateway))
    api.include_router(classify_routes(gateway))
    started_s = int(time.time())

    @api.post("/v1/completions", response_model=None, responses={200: _ANSWER, **openapi.GENERATION})
    async def completions(body: CompletionBody) -> Response:
        """Complete a prompt, through the adapters that the router, `model` or `mixture` chooses."""
        answer = await gateway.answer(body.translate())
        return await _respond(answer, body)

    @api.post("/v1/chat/completions", response_model=None, responses={200: _ANSWER, **openapi.GENERATION})
    async def chat_completions(body: ChatBody) -> Response:
        """Answer the last message of a chat, through the adapters that the router, `model` or `mixture` chooses."""
        answer = await gateway.answer(body.translate())
        return await _respond(answer, body)

    @api.post("/v1/route", response_model=None, responses=openapi.ROUTING)
    async def route(body: RouteBody) -> Json:
        """Say which adapters a prompt would be answered through, without answering it."""
        return routing_json(await gateway.route(body.translate()))

    @api.get("/v1/models", response_model=None, responses=openapi.LISTING)
    async def models() -> Json:
        """List every name that `model` may have, as of now."""
        entry = {"object": "model", "created": started_s, "owned_by": "zephyra"}
        return {"object": "list", "data": [{"id": name, **entry} for name in gateway.models()]}

    @api.get("/health", response_model=None, responses=openapi.HEALTH)
    async def health() -> Json:
        """Say whether prompts are answered, and what the catalog holds."""
        await gateway.check_ready()
        state = gateway.state
        return {
            "status": "ok",
            "generation": state.generation,
            "domains": len(state.adapters),
            "router": state.router,
        }

    return api


async def _respond(answer: Answer, body: CompletionBody | ChatBody) -> Response:
    reply = Reply(body)
    if body.stream:
        return _EventStream(_events(answer, reply, body.wants_usage))
    async with aclosing(answer):
        async for piece in answer.pieces():
            reply.add(piece.index, piece.chunk)
    return JSONResponse({**reply.whole(), "zephyra": routing_json(answer.routing)})


class _EventStream(StreamingResponse):
    """Server-sent events. However the connection ends, what makes the events is closed."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_until_gone() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                # So Serve tells a client that left, instead of ASGI's message.
                return {"type": "http.disconnect"}

        async with aclosing(self._events):
            await super().__call__(scope, receive_until_gone, send)


async def _events(answer: Answer, reply: Reply, wants_usage: bool) -> AsyncGenerator[str, None]:
    is_first = True
    async with aclosing(answer):
        try:
            async for piece in answer.pieces():
                if (event := reply.add(piece.index, piece.chunk)) is not None:
                    yield _event({**event, "zephyra": routing_json(answer.routing)} if is_first else event)
                    is_first = False
        except ZephyraError as error:
            # The status is out already; the stream itself must say what went wrong.
            yield _event(_error_json(message_of(error), status_of(error).openai_type, code_of(error)))
            return
    if wants_usage:
        yield _event(reply.usage_event())
    yield "data: [DONE]\n\n"


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def _error_json(message: str, openai_type: str, code: str | None, param: str | None = None) -> Json:
    return {"error": {"message": message, "type": openai_type, "param": param, "code": code}}


async def _on_zephyra_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ZephyraError)
    return _error_response(error)


def _error_response(error: ZephyraError) -> Response:
    status = status_of(error)
    content = _error_json(message_of(error), status.openai_type, code_of(error))
    return JSONResponse(content, status_code=status.http, headers=_HEADERS.get(type(error)))


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    body = _BODIES.get(request.scope["route"].path)
    path = [str(part) for part in problem["loc"][1:]]
    param = path[0] if path and problem["type"] != "json_invalid" else None
    fields = [] if body is None else list(body.model_fields)
    content = _error_json(sentence(problem, fields), "invalid_request_error", "invalid_input", param)
    return JSONResponse(content, status_code=400)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, Refusal):
        response = _error_response(error.error)
        if isinstance(error.error, DeadlineExceeded):
            # Who sends that slowly is not waited for any longer.
            response.headers["connection"] = "close"
        return response
    sentences = {
        400: "The body cannot be read; send a JSON object encoded as UTF-8.",
        404: f"There is nothing at {request.url.path}; the paths are listed at /openapi.json.",
        405: f"{request.method} is not possible at {request.url.path}; the methods are listed at /openapi.json.",
    }
    message = message_of(ZephyraError(sentences.get(error.status_code, error.detail)))
    content = _error_json(message, "invalid_request_error", None)
    return JSONResponse(content, status_code=error.status_code, headers=error.headers)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    request_id = request.headers.get("x-request-id", uuid.uuid4().hex)
    logger.error("Request %s failed.", request_id, exc_info=error)
    message = f"Internal error in request {request_id}; it has been logged."
    return JSONResponse(_error_json(message, "server_error", "internal_error"), status_code=500)
