"""Refuses HTTP bodies beyond a limit with 413 in OpenAI's shape, whether their length is announced or found out.

FastAPI's own limit answers an announced length in plain text.
"""

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 4 * 2**20
"""Holds the longest prompt, and leaves room for a large mixture."""

UPLOAD_PATH = "/v1/domains"
_FORM_BYTES = 2**16
"""Of an upload beside its files: what stands around them, and the short fields."""


class BodyLimit:
    """Middleware: `app` never sees more than `max_bytes` of a body, or `upload_bytes` of a form with a domain."""

    def __init__(self, app: ASGIApp, upload_bytes: int, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._upload_bytes = upload_bytes
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes, message = self._limit(scope)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > max_bytes:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            await JSONResponse({"error": error}, status_code=413)(scope, receive, send)
            return
        received_bytes = 0

        async def receive_counted() -> Message:
            nonlocal received_bytes
            received = await receive()
            received_bytes += len(received.get("body", b""))
            if received_bytes > max_bytes:
                # FastAPI turns any other exception of a body being read into 400.
                raise HTTPException(413, message)
            return received

        await self._app(scope, receive_counted, send)

    def _limit(self, scope: Scope) -> tuple[int, str]:
        """The most bytes of this request's body, and what is said of more."""
        content_type = Headers(scope=scope).get("content-type", "")
        if scope["path"].endswith(UPLOAD_PATH) and content_type.startswith("multipart/form-data"):
            message = f"The upload is larger than {self._upload_bytes} bytes, which is the most"
            return self._upload_bytes + _FORM_BYTES, f"{message}; raise the setting upload_bytes."
        return (
            self._max_bytes,
            f"The body is larger than {self._max_bytes} bytes, which is the most; send a shorter prompt.",
        )
