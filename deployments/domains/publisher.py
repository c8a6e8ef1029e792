"""Adds, withdraws and shows domains for clients: what takes torch, a disk or a bucket, away from the Gateway."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from cluster.config.places import absolute
from cluster.config.serving import AppSettings
from cluster.errors import InvalidInput
from cluster.lora.artifacts import Store
from cluster.router.examples import MAX_EXAMPLES_BYTES, Examples
from deployments.domains.info import DomainChange, DomainHistory, DomainPage, NewDomain
from deployments.domains.operations import Domains
from deployments.domains.uploads import EXAMPLES_JSON, EXAMPLES_TEXT, Uploads

T = TypeVar("T")


class Publisher:
    """`Domains` for callers in other processes. Changes are made one after the other, and nobody waits to look."""

    def __init__(self, settings: AppSettings) -> None:
        torch.set_num_threads(1)
        root = settings.resolved_root()
        self._reading, self._writing = Domains(Store(root)), Domains(Store(root))
        self._uploads = Uploads(settings.upload_bytes)
        self._allowed = None if settings.adapter_folder is None else absolute(settings.adapter_folder)
        self._reader, self._writer, self._receiver = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"publisher-{name}")
            for name in ("reads", "writes", "receives")
        )

    async def page(self, limit: int, after: str) -> DomainPage:
        """As `Domains.page`."""
        return await _run(self._reader, self._reading.page, limit, after)

    async def show(self, name: str) -> DomainHistory:
        """As `Domains.show`."""
        return await _run(self._reader, self._reading.show, name)

    async def open_upload(self) -> str:
        """The name of a new upload, to be discarded in any case. Raises `Overloaded`."""
        return await _run(self._receiver, self._uploads.open)

    async def write(self, upload: str, file: str, chunk: bytes) -> None:
        """Append to a file of an upload. Raises `UploadTooLarge`, or `InvalidInput` for a file that is none of it."""
        await _run(self._receiver, self._uploads.write, upload, file, chunk)

    async def discard(self, upload: str) -> None:
        """Remove an upload and its files."""
        await _run(self._receiver, self._uploads.discard, upload)

    async def add(self, new: NewDomain) -> DomainChange:
        """As `Domains.add`, of an upload or of a folder below the one that the settings allow."""
        return await _run(self._writer, self._add, new)

    async def remove(self, name: str, expected_generation: int | None) -> DomainChange:
        """As `Domains.remove`."""
        return await _run(self._writer, self._writing.remove, name, expected_generation)

    async def rollback(self, name: str, version: int | None, expected_generation: int | None) -> DomainChange:
        """As `Domains.rollback`."""
        return await _run(self._writer, self._writing.rollback, name, version, expected_generation)

    def __del__(self) -> None:
        """Serve calls this when the deployment is stopped."""
        self._uploads.close()

    def _add(self, new: NewDomain) -> DomainChange:
        if (new.upload is None) == (new.adapter_uri is None):
            raise InvalidInput("Expected either an uploaded adapter or adapter_uri; give exactly one of them.")
        folder = self._named_folder(new.adapter_uri) if new.upload is None else self._uploads.folder(new.upload)
        examples = _examples(new, None if new.upload is None else folder)
        return self._writing.add(new.name, folder, examples, new.is_data_free, new.expected_generation)

    def _named_folder(self, uri: str | None) -> Path:
        """The folder that a client names. What lies elsewhere is not told from what is not there."""
        assert uri is not None
        if self._allowed is None:
            raise InvalidInput(
                "No folder is open to adapter_uri here; upload the adapter, or serve with the setting adapter_folder."
            )
        try:
            folder = (self._allowed / uri.removeprefix("file://")).resolve(strict=True)
            is_allowed = folder.is_dir() and folder.is_relative_to(self._allowed)
        except (OSError, ValueError):
            is_allowed = False
        if not is_allowed:
            raise InvalidInput(
                f"{uri[:200]!r} is no folder below the one that adapter_uri may name, the setting adapter_folder."
            )
        return folder


def _examples(new: NewDomain, uploaded: Path | None) -> Examples:
    """The examples, however they came. Raises `InvalidInput` when they came twice, `InvalidData` for bad ones."""
    content = [(Examples(new.examples).to_bytes(), True)] if new.examples else []
    for name in (EXAMPLES_JSON, EXAMPLES_TEXT) if uploaded is not None else ():
        assert uploaded is not None
        if (file := uploaded / name).is_file():
            if file.stat().st_size > MAX_EXAMPLES_BYTES:
                raise InvalidInput(f"The examples are larger than {MAX_EXAMPLES_BYTES} bytes; give fewer.")
            content.append((file.read_bytes(), name == EXAMPLES_JSON))
    if len(content) > 1:
        raise InvalidInput("The examples came twice; give them once.")
    return Examples.from_bytes(*content[0]) if content else Examples()


async def _run(thread: ThreadPoolExecutor, work: Callable[..., T], *args: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, work, *args)
