"""Refuses HTTP bodies beyond a limit with 413 in OpenAI's shape, whether their length is announced or found out.

FastAPI's own limit answers an announced length in plain text.
"""

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 4 * 2**20
"""Holds the longest prompt, and leaves room for a large mixture."""


class BodyLimit:
    """Middleware: `app` never sees more than `max_bytes` of a body."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._message = f"The body is larger than {max_bytes} bytes, which is the most; send a shorter prompt."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        received_bytes = 0

        async def receive_counted() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._max_bytes:
                # FastAPI turns any other exception of a body being read into 400.
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, receive_counted, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = {"message": self._message, "type": "invalid_request_error", "param": None, "code": None}
        await JSONResponse({"error": error}, status_code=413)(scope, receive, send)
