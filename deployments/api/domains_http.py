"""Domains as a resource over HTTP, and vLLM's two endpoints for adapters. Translates, nothing else."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cluster.errors import InvalidInput
from deployments.api import openapi
from deployments.api.access import Access
from deployments.api.body_limit import UPLOAD_PATH
from deployments.api.domains_messages import (
    FORM_SCHEMA,
    AddBody,
    Json,
    LoadBody,
    RollbackBody,
    UnloadBody,
    change_json,
    history_json,
    new_domain,
    one_generation,
    page_json,
)
from deployments.api.keys import Role
from deployments.domains.info import DomainChange, NewDomain
from deployments.domains.remote_domains import CHUNK_BYTES, RemoteDomains, RemoteUpload
from deployments.domains.uploads import EXAMPLES_JSON, EXAMPLES_TEXT, FILE_OF_FIELD

PAGE, MAX_PAGE = 100, 1000

_FIELDS = ("name", "data_free", "expected_generation")
_EXAMPLES = "examples"
_ADD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": FORM_SCHEMA},
            "application/json": {"schema": AddBody.model_json_schema()},
        },
    }
}

_SAID: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}

_Expected = Annotated[int | None, Header(alias="expected-generation", ge=0, le=2**53)]


def domain_routes(domains: RemoteDomains, access: Access) -> APIRouter:
    """The paths below /v1/domains, and vLLM's."""
    routes = APIRouter()

    async def check_may_change(request: Request) -> None:
        domains.check_changes_allowed()
        access.check_request(request, Role.ADMIN)

    changes: dict[str, Any] = {
        "response_model": None,
        "dependencies": [Depends(check_may_change)],
        "responses": openapi.DOMAIN_CHANGES,
    }
    # A response_class of text would make the errors text as well, in the description.
    vllms = {**changes, "responses": {200: _SAID, **openapi.DOMAIN_CHANGES}}

    @routes.get(UPLOAD_PATH, response_model=None, responses=openapi.DOMAINS)
    async def list_domains(limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = PAGE, after: str = "") -> Json:
        """List domains by name, those that come after `after`."""
        return page_json(await domains.page(limit, after))

    @routes.get(f"{UPLOAD_PATH}/{{name}}", response_model=None, responses=openapi.DOMAINS)
    async def show_domain(name: str) -> Json:
        """Show a domain with its versions and files."""
        return history_json(await domains.show(name))

    @routes.post(UPLOAD_PATH, status_code=201, openapi_extra=_ADD_SCHEMA, **changes)
    async def add_domain(request: Request, expected_generation: _Expected = None) -> Response:
        """Publish an adapter as the next version of a domain: a form with its files, or JSON that names a folder."""
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            change = await _add_uploaded(domains, request, expected_generation)
        else:
            change = await domains.add((await _add_body(request)).translate(expected_generation))
        return JSONResponse(change_json(change), status_code=201)

    @routes.delete(f"{UPLOAD_PATH}/{{name}}", **changes)
    async def remove_domain(name: str, expected_generation: _Expected = None) -> Json:
        """Withdraw a domain; its files stay."""
        return change_json(await domains.remove(name, expected_generation))

    @routes.post(f"{UPLOAD_PATH}/{{name}}/rollback", **changes)
    async def rollback_domain(name: str, body: RollbackBody, expected_generation: _Expected = None) -> Json:
        """Make an earlier version current again; also brings back a domain that was withdrawn."""
        expected = one_generation(body.expected_generation, expected_generation)
        return change_json(await domains.rollback(name, body.version, expected))

    @routes.post("/v1/load_lora_adapter", **vllms)
    async def load_lora_adapter(body: LoadBody) -> Response:
        """vLLM's way to publish an adapter below the folder that the settings allow."""
        change = await domains.add(NewDomain(body.lora_name, adapter_uri=body.lora_path))
        return PlainTextResponse(f"Success: {change.ref} was added; its model is zephyra:{change.domain}.")

    @routes.post("/v1/unload_lora_adapter", **vllms)
    async def unload_lora_adapter(body: UnloadBody) -> Response:
        """vLLM's way to withdraw a domain."""
        await domains.remove(body.lora_name, None)
        return PlainTextResponse(f"Success: {body.lora_name} was removed.")

    return routes


async def _add_body(request: Request) -> AddBody:
    try:
        return AddBody.model_validate_json(await request.body())
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


async def _add_uploaded(domains: RemoteDomains, request: Request, expected_generation: int | None) -> DomainChange:
    """Publish what a form holds. Its files go to disk as they come, and on to the publisher in pieces."""
    async with domains.upload() as upload:
        form = await _received(request)
        try:
            fields = _fields(form)
            new = new_domain(fields, expected_generation)
            for part, content in form.multi_items():
                if part not in _FIELDS:
                    await _pass_on(upload, part, content)
        finally:
            await form.close()
        return await upload.add(new)


async def _received(request: Request) -> FormData:
    try:
        return await request.form(max_files=len(FILE_OF_FIELD) + 1, max_fields=len(_FIELDS) + 1)
    except ClientDisconnect as error:
        raise InvalidInput("The upload ended before it was complete; send it again.") from error
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidInput(f"The form cannot be read: {error.detail} Large fields are sent as files.") from error


def _fields(form: FormData) -> dict[str, str]:
    """The short fields. Raises `InvalidInput` for a part that is none, or comes twice, or is or isn't a file."""
    known = (*_FIELDS, *FILE_OF_FIELD, _EXAMPLES)
    fields: dict[str, str] = {}
    seen = set()
    for part, content in form.multi_items():
        if part not in known:
            raise InvalidInput(f"There is no field {part[:80]!r}; the fields are: {', '.join(known)}.")
        if part in seen:
            raise InvalidInput(f"The field {part!r} comes twice; give it once.")
        seen.add(part)
        is_file = isinstance(content, UploadFile)
        if (part in FILE_OF_FIELD and not is_file) or (part in _FIELDS and is_file):
            raise InvalidInput(f"The field {part!r} is {'a' if is_file else 'no'} file; send it as the other.")
        if part in _FIELDS:
            assert isinstance(content, str)
            fields[part] = content
    return fields


async def _pass_on(upload: RemoteUpload, part: str, content: UploadFile | str) -> None:
    if isinstance(content, str):
        await upload.write(EXAMPLES_TEXT, content.encode())
        return
    name = FILE_OF_FIELD.get(part)
    if name is None:
        name = EXAMPLES_JSON if (content.filename or "").endswith(".jsonl") else EXAMPLES_TEXT
    # An empty file is there all the same.
    await upload.write(name, b"")
    while chunk := await content.read(CHUNK_BYTES):
        await upload.write(name, chunk)
