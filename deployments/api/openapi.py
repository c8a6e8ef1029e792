"""What /openapi.json says of errors: OpenAI's shape, and which of them come with which status, out of the one table."""

from collections import defaultdict
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from cluster import errors
from cluster.errors import ZephyraError
from deployments.api.status import STATUS, code_of

Responses = dict[int | str, dict[str, Any]]
"""As FastAPI takes them: by status."""

_ANY_CALLER = (errors.InvalidKey, errors.RoleRefused, errors.PeerRefused, errors.KeysUnavailable)
_ANY_BODY = (errors.UploadTooLarge, errors.DeadlineExceeded)
_ASKING_THE_ROUTER = (*_ANY_BODY, errors.RouterUnavailable)
_LOOKING_AT_DOMAINS = (
    errors.UnknownDomain,
    errors.CorruptArtifact,
    errors.PublisherUnavailable,
    errors.StorageUnavailable,
)


class ErrorObject(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorObject


def error_responses(*classes: type[ZephyraError]) -> Responses:
    """The errors that an operation may answer with: these, and those of any request."""
    codes: defaultdict[int, list[str]] = defaultdict(list, {500: ["internal_error"]})
    named: tuple[type[ZephyraError], ...] = (errors.InvalidInput, *classes)
    for cls in dict.fromkeys(named):
        codes[STATUS[cls].http].append(code_of(cls("")))
    return {status: {"model": ErrorBody, "description": ", ".join(sorted(of))} for status, of in sorted(codes.items())}


ROUTING = error_responses(*_ANY_CALLER, *_ASKING_THE_ROUTER)
FEEDBACK = error_responses(*_ANY_CALLER, *_ANY_BODY, errors.UnknownDomain, errors.UnknownRequest)
HEALTH = error_responses(errors.ReplicaLost)
LISTING = error_responses(*_ANY_CALLER)
GENERATION = error_responses(
    *_ANY_CALLER,
    *_ASKING_THE_ROUTER,
    errors.InvalidMixture,
    errors.PromptTooLong,
    errors.UnknownModel,
    errors.UnknownDomain,
    errors.IncompatibleAdapter,
    errors.CorruptArtifact,
    errors.Overloaded,
    errors.AdapterUnavailable,
    errors.StorageUnavailable,
    errors.ReplicaLost,
)
DOMAINS = error_responses(*_ANY_CALLER, *_LOOKING_AT_DOMAINS)
DOMAIN_CHANGES = error_responses(
    *_ANY_CALLER,
    *_LOOKING_AT_DOMAINS,
    *_ANY_BODY,
    errors.CatalogConflict,
    errors.IncompatibleAdapter,
    errors.InvalidAdapter,
    errors.InvalidData,
    errors.StageOrder,
    errors.Overloaded,
)


class DescribedApi(FastAPI):
    """FastAPI, whose description does not promise its own error 422: a bad body is 400 here, as OpenAI has it."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            described = super().openapi()
            for operations in described["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                described["components"]["schemas"].pop(name, None)
        assert self.openapi_schema is not None
        return self.openapi_schema
