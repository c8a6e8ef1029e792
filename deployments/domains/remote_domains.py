"""The publisher as the Gateway sees it: looks at domains, changes them, and passes uploads on in pieces."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from cluster.config.serving import AppSettings
from cluster.errors import PeerRefused, PublisherUnavailable
from deployments import calls
from deployments.domains.info import DomainChange, DomainHistory, DomainPage, NewDomain

CHUNK_BYTES = 2**20
_READ_WAIT_S, _CHUNK_WAIT_S, _CHANGE_WAIT_S = 30.0, 60.0, 300.0
"""A change waits for those before it, and each may have to encode ten thousand examples."""


class RemoteDomains:
    """The operations of `Domains` over a handle of the `Publisher`."""

    def __init__(self, publisher: calls.Handle, settings: AppSettings) -> None:
        self.upload_bytes = settings.upload_bytes
        self._are_changes_allowed = settings.domain_changes
        self._page, self._show, self._open, self._write, self._discard, self._remove, self._rollback = (
            calls.method(publisher, name)
            for name in ("page", "show", "open_upload", "write", "discard", "remove", "rollback")
        )
        # Examples may be larger than a message.
        self._add = calls.method(publisher, "add", by_reference=True)

    def check_changes_allowed(self) -> None:
        """Raise `PeerRefused` where nobody may change domains over the network."""
        if not self._are_changes_allowed:
            raise PeerRefused("Domains are not changed over the network here; use `zephyra domains`.")

    async def page(self, limit: int, after: str) -> DomainPage:
        """As `Domains.page`."""
        lost = PublisherUnavailable("The publisher does not answer; try again in a few seconds.")
        page: DomainPage = await calls.read(self._page, limit, after, timeout_s=_READ_WAIT_S, lost=lost)
        return page

    async def show(self, name: str) -> DomainHistory:
        """As `Domains.show`."""
        lost = PublisherUnavailable("The publisher does not answer; try again in a few seconds.")
        history: DomainHistory = await calls.read(self._show, name, timeout_s=_READ_WAIT_S, lost=lost)
        return history

    async def add(self, new: NewDomain) -> DomainChange:
        """As `Domains.add`, of a folder that the publisher may read."""
        return await _changed(self._add, new)

    async def remove(self, name: str, expected_generation: int | None) -> DomainChange:
        """As `Domains.remove`."""
        return await _changed(self._remove, name, expected_generation)

    async def rollback(self, name: str, version: int | None, expected_generation: int | None) -> DomainChange:
        """As `Domains.rollback`."""
        return await _changed(self._rollback, name, version, expected_generation)

    @asynccontextmanager
    async def upload(self) -> AsyncIterator["RemoteUpload"]:
        """Files of a domain on their way; however this ends, nothing is left of them. Raises `Overloaded`."""
        name: str = await _call(self._open)
        try:
            yield RemoteUpload(name, self._write, self._add)
        finally:
            await _call(self._discard, name)


class RemoteUpload:
    """One upload."""

    def __init__(self, name: str, write: calls.Handle, add: calls.Handle) -> None:
        self._name, self._write, self._add = name, write, add

    async def write(self, file: str, content: bytes) -> None:
        """Append to a file. Raises `UploadTooLarge`, or `InvalidInput` for a file that is none of a domain's."""
        # An empty one is there all the same.
        for start in range(0, max(len(content), 1), CHUNK_BYTES):
            await _call(self._write, self._name, file, content[start : start + CHUNK_BYTES])

    async def add(self, new: NewDomain) -> DomainChange:
        """Publish what was uploaded as `new`."""
        return await _changed(self._add, replace(new, upload=self._name))


async def _call(remote: calls.Handle, *args: object) -> Any:
    lost = PublisherUnavailable("The publisher died during the upload, which has changed nothing; send it again.")
    return await calls.call(remote, *args, timeout_s=_CHUNK_WAIT_S, lost=lost)


async def _changed(remote: calls.Handle, *args: object) -> DomainChange:
    lost = PublisherUnavailable(
        "The publisher did not say whether the change was made; look at the domain before trying again."
    )
    change: DomainChange = await calls.call(remote, *args, timeout_s=_CHANGE_WAIT_S, lost=lost)
    return change
