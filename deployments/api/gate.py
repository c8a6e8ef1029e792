"""The gate of the HTTP application: what comes before any body is read."""

from collections.abc import Callable

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import ZephyraError
from deployments.api.access import Access
from deployments.api.keys import Role

OPEN_PATHS = frozenset({"/health", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})
"""For whoever asks whether the system is well, and what it understands."""


class Gate:
    """Middleware: `app` sees requests of callers who may ask for answers, and of anybody to the open paths.

    `refusal` makes the answer to all others.
    """

    def __init__(self, app: ASGIApp, access: Access, refusal: Callable[[ZephyraError], Response]) -> None:
        self._app, self._access, self._refusal = app, access, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request."""
        if scope["type"] == "http" and _path(scope) not in OPEN_PATHS:
            try:
                self._access.check_request(HTTPConnection(scope), Role.INFER)
            except ZephyraError as error:
                await self._refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
