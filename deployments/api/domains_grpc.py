"""Domains over gRPC. Translates to and from messages, nothing else."""

import asyncio
import json
from collections.abc import AsyncIterator

from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

from cluster.errors import DeadlineExceeded, InvalidInput, UploadTooLarge
from deployments.api.body_limit import MAX_BODY_BYTES
from deployments.api.domains_http import MAX_PAGE, PAGE
from deployments.api.grpc_api import errors_to
from deployments.domains.info import DomainChange, DomainHistory, DomainInfo, DomainPage, NewDomain
from deployments.domains.remote_domains import RemoteDomains, RemoteUpload
from deployments.domains.uploads import EXAMPLES_JSON, FILE_OF_FIELD, IDLE_S
from deployments.protos import zephyra_pb2 as pb


async def list_domains(
    domains: RemoteDomains, request: pb.ListDomainsRequest, context: RayServegRPCContext
) -> pb.DomainPage:
    """Some of the domains, by name."""
    with errors_to(context):
        limit = request.limit if request.HasField("limit") else PAGE
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidInput(f"limit is {limit}; expected 1 to {MAX_PAGE}.")
        return _page(await domains.page(limit, request.after))


async def get_domain(
    domains: RemoteDomains, request: pb.GetDomainRequest, context: RayServegRPCContext
) -> pb.DomainHistory:
    """One domain with its versions and files."""
    with errors_to(context):
        return _history(await domains.show(request.name))


async def add_domain(
    domains: RemoteDomains, requests: gRPCInputStream[pb.AddDomainRequest], context: RayServegRPCContext
) -> pb.DomainChange:
    """Publish what a stream of pieces holds; they are passed on as they come."""
    with errors_to(context):
        domains.check_changes_allowed()
        messages = _in_time(requests)
        first = await anext(messages, pb.AddDomainRequest())
        if first.WhichOneof("part") != "domain":
            raise InvalidInput("The first message holds no domain; begin with its name, then send its files.")
        new = _new_domain(first.domain)
        if new.adapter_uri is not None:
            if await anext(messages, None) is not None:
                raise InvalidInput("There is an adapter_uri and another message; give one or the other.")
            return _change(await domains.add(new))
        async with domains.upload() as upload:
            async for message in messages:
                await _pass_on(upload, message)
            return _change(await upload.add(new))


async def _in_time(requests: gRPCInputStream[pb.AddDomainRequest]) -> AsyncIterator[pb.AddDomainRequest]:
    """The messages. Raises `InvalidInput` if the client leaves before the last, `DeadlineExceeded` if it takes long."""
    end_s = asyncio.get_running_loop().time() + IDLE_S
    while True:
        left_s = end_s - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(anext(requests, None), left_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"The upload took longer than {IDLE_S:g} s; send it faster.") from error
        if requests.is_cancelled():
            # Which otherwise looks like the end.
            raise InvalidInput("The upload ended before it was complete; send it again.")
        if message is None:
            return
        yield message


async def remove_domain(
    domains: RemoteDomains, request: pb.RemoveDomainRequest, context: RayServegRPCContext
) -> pb.DomainChange:
    """Withdraw a domain."""
    with errors_to(context):
        domains.check_changes_allowed()
        return _change(await domains.remove(request.name, _expected(request)))


async def rollback_domain(
    domains: RemoteDomains, request: pb.RollbackDomainRequest, context: RayServegRPCContext
) -> pb.DomainChange:
    """Make an earlier version current again."""
    with errors_to(context):
        domains.check_changes_allowed()
        version = request.version if request.HasField("version") else None
        return _change(await domains.rollback(request.name, version, _expected(request)))


async def _pass_on(upload: RemoteUpload, request: pb.AddDomainRequest) -> None:
    if request.ByteSize() > MAX_BODY_BYTES:
        raise UploadTooLarge(
            f"A message is larger than {MAX_BODY_BYTES} bytes, which is the most; send smaller pieces."
        )
    part = request.WhichOneof("part")
    if part == "examples":
        lines = "".join(f"{json.dumps(prompt)}\n" for prompt in request.examples.prompts)
        await upload.write(EXAMPLES_JSON, lines.encode())
    elif part in FILE_OF_FIELD:
        await upload.write(FILE_OF_FIELD[part], getattr(request, part))
    else:
        raise InvalidInput("A message after the first holds no piece of a file and no examples; send one or the other.")


def _new_domain(domain: pb.NewDomain) -> NewDomain:
    uri = domain.adapter_uri if domain.HasField("adapter_uri") else None
    return NewDomain(domain.name, None, uri, tuple(domain.examples), domain.data_free, _expected(domain))


def _expected(request: pb.NewDomain | pb.RemoveDomainRequest | pb.RollbackDomainRequest) -> int | None:
    return request.expected_generation if request.HasField("expected_generation") else None


def _page(page: DomainPage) -> pb.DomainPage:
    return pb.DomainPage(domains=map(_domain, page.domains), generation=page.generation, has_more=page.has_more)


def _history(history: DomainHistory) -> pb.DomainHistory:
    return pb.DomainHistory(
        domain=_domain(history.current),
        versions=history.versions,
        files=history.files,
        generation=history.generation,
    )


def _domain(info: DomainInfo) -> pb.Domain:
    return pb.Domain(
        name=info.name,
        version=info.version,
        rank=info.rank,
        num_bytes=info.num_bytes,
        num_prototypes=info.num_prototypes,
        data_free=info.is_data_free,
        tags=info.tags,
        aliases=info.aliases,
        problem=info.problem,
    )


def _change(change: DomainChange) -> pb.DomainChange:
    return pb.DomainChange(name=change.domain, version=change.version, generation=change.generation)
