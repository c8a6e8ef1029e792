"""Bounds what an HTTP client may send: the bytes of its body, the time they take, and its headers.

Serve's proxy bounds none of them, and FastAPI's own limit of a body answers in plain text.
"""

import asyncio
from collections.abc import Callable

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import DeadlineExceeded, InvalidInput, UploadTooLarge, ZephyraError
from deployments.domains.uploads import IDLE_S

MAX_BODY_BYTES = 4 * 2**20
"""Holds the longest prompt, and leaves room for a large mixture."""

BODY_S = 60.0
"""For a whole body that is no upload; one that is has `IDLE_S`."""

MAX_HEADERS, MAX_HEADERS_BYTES = 128, 2**16

UPLOAD_PATH = "/v1/domains"
_FORM_BYTES = 2**16
"""Of an upload beside its files: what stands around them, and the short fields."""


class Refusal(HTTPException):
    """What is wrong with a body, found while it is read: FastAPI turns any other exception there into 400."""

    def __init__(self, error: ZephyraError) -> None:
        super().__init__(500, str(error))
        self.error = error


class BodyLimit:
    """Middleware: `app` never sees more than `max_bytes` of a body, or `upload_bytes` of a form with a domain, never
    waits for one longer than `body_s`, and never sees more headers than anybody needs. `refusal` makes the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        upload_bytes: int,
        refusal: Callable[[ZephyraError], Response],
        max_bytes: int = MAX_BODY_BYTES,
        body_s: float = BODY_S,
    ) -> None:
        self._app = app
        self._upload_bytes = upload_bytes
        self._refusal = refusal
        self._max_bytes = max_bytes
        self._body_s = body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = _is_upload(scope)
        max_bytes = self._upload_bytes + _FORM_BYTES if is_upload else self._max_bytes
        if (error := _problem_of_headers(scope)) is not None or _announced_bytes(scope) > max_bytes:
            await self._refusal(error or self._too_large(is_upload))(scope, receive, send)
            return
        body_s = IDLE_S if is_upload else self._body_s
        end_s = asyncio.get_running_loop().time() + body_s
        received_bytes, is_whole = 0, False

        async def receive_bounded() -> Message:
            nonlocal received_bytes, is_whole
            if is_whole:
                # What comes after the body is that the client has left.
                return await receive()
            try:
                async with asyncio.timeout_at(end_s):
                    received = await receive()
            except TimeoutError as late:
                raise Refusal(DeadlineExceeded(f"The body took longer than {body_s:g} s; send it faster.")) from late
            received_bytes += len(received.get("body", b""))
            if received_bytes > max_bytes:
                raise Refusal(self._too_large(is_upload))
            is_whole = not received.get("more_body", False)
            return received

        await self._app(scope, receive_bounded, send)

    def _too_large(self, is_upload: bool) -> UploadTooLarge:
        if is_upload:
            message = f"The upload is larger than {self._upload_bytes} bytes, which is the most"
            return UploadTooLarge(f"{message}; raise the setting upload_bytes.")
        return UploadTooLarge(
            f"The body is larger than {self._max_bytes} bytes, which is the most; send a shorter prompt."
        )


def _is_upload(scope: Scope) -> bool:
    content_type = Headers(scope=scope).get("content-type", "")
    is_form = content_type.startswith("multipart/form-data")
    return is_form and str(scope["path"]).endswith(UPLOAD_PATH)


def _announced_bytes(scope: Scope) -> int:
    announced = Headers(scope=scope).get("content-length", "")
    return int(announced[:20]) if announced.isdecimal() else 0


def _problem_of_headers(scope: Scope) -> InvalidInput | None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    num_bytes = sum(len(name) + len(value) for name, value in headers)
    if len(headers) <= MAX_HEADERS and num_bytes <= MAX_HEADERS_BYTES:
        return None
    return InvalidInput(
        f"The request has {len(headers)} headers of {num_bytes} bytes; the most is {MAX_HEADERS} of "
        f"{MAX_HEADERS_BYTES} bytes: send fewer."
    )
