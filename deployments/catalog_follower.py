"""Keeps a process's view of the catalog at most 250 ms old, off the request path. Knows nothing of what uses it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cluster.lora.catalog import Catalog, CatalogState, CatalogWatcher

logger = logging.getLogger("ray.serve")

POLL_PERIOD_S = 0.25


class CatalogFollower:
    """`state` is what the catalog held at the last good poll. Must be made inside a running event loop.

    A new base is not followed: it withdraws the adapters and the router of the old one, which the replicas still
    run. The system as it was goes on being served until it is started anew.
    """

    def __init__(
        self,
        catalog: Catalog,
        on_change: Callable[[CatalogState], Awaitable[None]] | None = None,
        period_s: float = POLL_PERIOD_S,
    ) -> None:
        self._watcher = CatalogWatcher(catalog)
        self._on_change = on_change
        self._period_s = period_s
        self.state = self._watcher.state
        self._refused: str | None = None
        # The loop holds its tasks weakly: without this reference the task could vanish.
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def stop(self) -> None:
        """Poll no more."""
        self._task.cancel()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self._look()
            except Exception as error:
                # Whatever is wrong with the newest generation, the last good one can still be served.
                self._refuse(f"The catalog could not be followed ({error}); the last good generation is served.")

    async def _look(self) -> None:
        state = await asyncio.to_thread(self._watcher.poll)
        if state.generation == self.state.generation:
            return
        if state.base != self.state.base:
            self._refuse(f"Base {state.base} was published; start anew to serve it instead of base {self.state.base}.")
            return
        if self._on_change is not None:
            await self._on_change(state)
        self.state = state
        self._refused = None
        logger.info("Serving generation %d of the catalog: %d domains.", state.generation, len(state.adapters))

    def _refuse(self, reason: str) -> None:
        if reason != self._refused:
            logger.error(reason)
        self._refused = reason
