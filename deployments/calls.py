"""Calls between deployments: timeouts, cancellation, transport, and what a lost callee turns into.

Ray keeps a remote call running when its caller times out, stops iterating or is cancelled, never repeats one that a
dying replica had accepted, and wraps exceptions together with their traceback. All of that ends here.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Protocol, TypeVar

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.errors import ZephyraError

T = TypeVar("T")

_LOST = (RayActorError, ObjectLostError, DeploymentUnavailableError, TimeoutError)
_RETRY_AFTER_S = 0.05

MESSAGE_BYTES = 3 * 2**20
"""What may be sent in a message, with room for what surrounds it: gRPC refuses more than 4 MiB, where it is not told
otherwise when Ray is started."""


class Handle(Protocol):
    """The part of Serve's DeploymentHandle that is used here."""

    def options(
        self,
        *,
        method_name: str,
        stream: bool,
        _by_reference: bool,
        request_serialization: str,
        response_serialization: str,
    ) -> "Handle":
        """The same handle, set to call one method."""

    def remote(self, *args: Any) -> Any:
        """Start the call: an awaitable, or for a stream an async iterator, that has `cancel()`."""


def method(handle: Handle, name: str, *, stream: bool = False, by_reference: bool = False) -> Handle:
    """`name` of the deployment behind `handle`, to be given to `call`, `read` or `stream`.

    Messages go over gRPC, two to four times as fast as Ray's object store but at most 4 MiB each; what may be larger
    goes `by_reference`. All that is sent is of importable classes, which plain pickle writes faster than cloudpickle.
    """
    return handle.options(
        method_name=name,
        stream=stream,
        _by_reference=by_reference,
        request_serialization="pickle",
        response_serialization="pickle",
    )


async def call(remote: Handle, *args: object, timeout_s: float, lost: ZephyraError) -> Any:
    """The result of one call. Raises what the callee raised, or `lost` when it died or took longer than `timeout_s`."""
    response = remote.remote(*args)
    with _plain_errors(lost):
        try:
            return await asyncio.wait_for(response, timeout_s)
        except BaseException:
            response.cancel()
            raise


async def read(remote: Handle, *args: object, timeout_s: float, lost: ZephyraError) -> Any:
    """As `call`, for what may safely run twice: a callee that dies is asked again until `timeout_s` are over."""
    end = asyncio.get_running_loop().time() + timeout_s
    while True:
        left_s = end - asyncio.get_running_loop().time()
        try:
            return await call(remote, *args, timeout_s=max(left_s, 0.0), lost=lost)
        except ZephyraError as error:
            if error is not lost or left_s <= _RETRY_AFTER_S:
                raise
        await asyncio.sleep(_RETRY_AFTER_S)


async def stream(
    remote: Handle, *args: object, lost: ZephyraError, item_timeout_s: float | None = None
) -> AsyncGenerator[Any, None]:
    """The items of one streamed call. Closing it early cancels the callee's generator.

    Raises what the callee raised or gave as an item, or `lost` when it died or an item took longer than
    `item_timeout_s`.
    """
    responses = remote.remote(*args)
    done = False
    try:
        with _plain_errors(lost):
            while True:
                try:
                    item = await asyncio.wait_for(anext(responses), item_timeout_s)
                except StopAsyncIteration:
                    done = True
                    return
                if isinstance(item, ZephyraError):
                    raise item
                yield item
    finally:
        if not done:
            responses.cancel()


async def merge(streams: Iterable[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Run all streams at once and yield each item as it comes. Closing it early closes them all."""
    items: asyncio.Queue[T | None] = asyncio.Queue()

    async def drain(items_of_one: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(items_of_one):
                async for item in items_of_one:
                    items.put_nowait(item)
        finally:
            items.put_nowait(None)

    tasks = [asyncio.ensure_future(drain(one)) for one in streams]
    running = len(tasks)
    try:
        while running:
            if (item := await items.get()) is None:
                running -= 1
            else:
                yield item
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


@contextmanager
def _plain_errors(lost: ZephyraError) -> Iterator[None]:
    try:
        yield
    except RayTaskError as error:
        # What the callee raised, dressed in a class whose text holds the traceback.
        raise error.cause from None
    except _LOST as error:
        raise lost from error
