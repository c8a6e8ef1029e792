"""One table: what each error class is called over HTTP, over gRPC and in OpenAI's error object.

Every class of `cluster.errors` is in `STATUS`, or in `NEVER_SENT`.
"""

import re
from dataclasses import dataclass

import grpc

from cluster import errors

_MAX_MESSAGE_CHARACTERS = 1000
"""gRPC carries the message in a header; a value quoted in it may be as long as a client likes."""


@dataclass(frozen=True, slots=True)
class Status:
    """How one class of error leaves Zephyra."""

    http: int
    grpc: grpc.StatusCode
    openai_type: str


_INVALID = Status(400, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error")
_NOT_FOUND = Status(404, grpc.StatusCode.NOT_FOUND, "invalid_request_error")
_WRONG_STATE = Status(409, grpc.StatusCode.FAILED_PRECONDITION, "invalid_request_error")
_TRY_AGAIN = Status(503, grpc.StatusCode.UNAVAILABLE, "server_error")
_INTERNAL = Status(500, grpc.StatusCode.INTERNAL, "server_error")

STATUS: dict[type[errors.ZephyraError], Status] = {
    errors.InvalidInput: _INVALID,
    errors.InvalidMixture: _INVALID,
    errors.PromptTooLong: _INVALID,
    errors.UploadTooLarge: Status(413, grpc.StatusCode.RESOURCE_EXHAUSTED, "invalid_request_error"),
    errors.UnknownModel: _NOT_FOUND,
    errors.UnknownDomain: _NOT_FOUND,
    errors.UnknownRequest: _NOT_FOUND,
    errors.IncompatibleAdapter: _WRONG_STATE,
    errors.CorruptArtifact: Status(500, grpc.StatusCode.DATA_LOSS, "server_error"),
    errors.InvalidAdapter: _INVALID,
    errors.CatalogConflict: Status(409, grpc.StatusCode.ABORTED, "invalid_request_error"),
    errors.InvalidData: _INVALID,
    errors.StageOrder: _WRONG_STATE,
    errors.PeerRefused: Status(403, grpc.StatusCode.PERMISSION_DENIED, "permission_error"),
    errors.InvalidKey: Status(401, grpc.StatusCode.UNAUTHENTICATED, "invalid_request_error"),
    errors.RoleRefused: Status(403, grpc.StatusCode.PERMISSION_DENIED, "permission_error"),
    errors.KeysUnavailable: _TRY_AGAIN,
    errors.Overloaded: Status(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error"),
    errors.DeadlineExceeded: Status(504, grpc.StatusCode.DEADLINE_EXCEEDED, "server_error"),
    errors.RouterUnavailable: _TRY_AGAIN,
    errors.PublisherUnavailable: _TRY_AGAIN,
    errors.AdapterUnavailable: _TRY_AGAIN,
    errors.StorageUnavailable: _TRY_AGAIN,
    errors.ReplicaLost: _TRY_AGAIN,
}

NEVER_SENT = frozenset({errors.ZephyraError, errors.NotTrained, errors.PortTaken, errors.GateRefused, errors.DiskFull})
"""The root of the tree, which nothing raises, what is raised before anything listens, and what only training raises."""

_OPENAI_CODES = {
    errors.UnknownModel: "model_not_found",
    errors.PromptTooLong: "context_length_exceeded",
    errors.InvalidKey: "invalid_api_key",
}
"""Codes that OpenAI's clients know; the others are the class's own name."""


def status_of(error: errors.ZephyraError) -> Status:
    """The row of the table for `error`. One that should never be sent is a mistake of ours."""
    return STATUS.get(type(error), _INTERNAL)


def code_of(error: errors.ZephyraError) -> str:
    """The `code` of OpenAI's error object: unknown_domain for UnknownDomain."""
    known = _OPENAI_CODES.get(type(error))
    return known or re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


def message_of(error: errors.ZephyraError) -> str:
    """What the client is told, cut to a length that fits a header."""
    text = str(error)
    return text if len(text) <= _MAX_MESSAGE_CHARACTERS else f"{text[: _MAX_MESSAGE_CHARACTERS - 3]}..."
