"""Tiny ada as a deployment: text in, decisions out, always with the router that the catalog says is current."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cluster.lora.catalog import Catalog, CatalogState
from cluster.messages import NONE_DOMAIN, RoutingDecision
from cluster.router.tiny_ada import TinyAda
from deployments.catalog_follower import CatalogFollower

logger = logging.getLogger("ray.serve")

NOT_ROUTED = RoutingDecision(probabilities={NONE_DOMAIN: 1.0}, weights={})
"""What every prompt gets while no router is published: the plain base."""


class Router:
    """Scores prompts with `root/router/<version>`."""

    def __init__(self, root: str) -> None:
        torch.set_num_threads(1)
        self._root = Path(root)
        self._version: int | None = None
        self._ada: TinyAda | None = None
        # Scoring a long prompt takes a while; on the event loop it would hold up health checks and other prompts.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tiny-ada")
        self._catalog = CatalogFollower(Catalog(self._root), self._take)
        self._load(self._catalog.state.router)

    async def route(self, texts: Sequence[str]) -> list[RoutingDecision]:
        """One decision per text."""
        if (ada := self._ada) is None:
            return [NOT_ROUTED] * len(texts)
        return await asyncio.get_running_loop().run_in_executor(self._worker, ada.route, list(texts))

    async def route_conversation(self, turns: Sequence[str]) -> RoutingDecision:
        """One decision for the last of a user's turns, in the light of those before it."""
        if (ada := self._ada) is None:
            return NOT_ROUTED
        return await asyncio.get_running_loop().run_in_executor(self._worker, ada.route_conversation, list(turns))

    async def _take(self, state: CatalogState) -> None:
        if state.router != self._version:
            await asyncio.to_thread(self._load, state.router)

    def _load(self, version: int | None) -> None:
        """Swap at the end: prompts go on being scored by the router before until the new one is ready."""
        self._ada = None if version is None else TinyAda.load(self._root / "router" / str(version))
        self._version = version
        logger.info("Routing with router %s.", version)
