"""Tiny ada as a deployment: text in, decisions out, always with the router that the catalog says is current.

A Gateway holds one of its own as well, and decides by it what takes less time than asking would (`at_hand`).
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from cluster.config.places import Root
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, CatalogState
from cluster.messages import NONE_DOMAIN, RoutingDecision
from cluster.router.assembly import RouterAssembly
from cluster.router.sentence_encoder import SentenceEncoder
from cluster.router.tiny_ada import TinyAda
from deployments.catalog_follower import CatalogFollower

logger = logging.getLogger("ray.serve")

NOT_ROUTED = RoutingDecision(probabilities={NONE_DOMAIN: 1.0}, weights={})
"""What every prompt gets while no router is published: the plain base."""

SHORT_CHARACTERS = 4000
"""Up to so many are scored in about a millisecond, for which an event loop may be held up."""


class Router:
    """Scores prompts with `root/router/<version>` and the prototypes that lie beside the adapters."""

    def __init__(self, root: Root) -> None:
        torch.set_num_threads(1)
        store = Store(root)
        self._assembly = RouterAssembly(store)
        self._ada: TinyAda | None = None
        self._made_of: tuple[object, ...] = ()
        # Scoring a long prompt takes a while; on the event loop it would hold up health checks and other prompts.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tiny-ada")
        self._catalog = CatalogFollower(Catalog(store), self._take)
        self._load(self._catalog.state)

    def at_hand(self, texts: Sequence[str]) -> TinyAda | None:
        """Tiny ada itself, to be asked in this very process: where there is one, without a pretrained encoder, and
        `texts` are short, the way to another process and back takes longer than scoring.
        """
        ada = self._ada
        if ada is None or isinstance(ada.encoder, SentenceEncoder) or sum(map(len, texts)) > SHORT_CHARACTERS:
            return None
        return ada

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
        if self._parts(state) != self._made_of:
            await asyncio.to_thread(self._load, state)

    def _load(self, state: CatalogState) -> None:
        """Swap at the end: prompts go on being scored by the router before until the new one is ready."""
        ada = self._assembly.assemble(state)
        for domain, problem in self._assembly.problems.items():
            logger.error("The domain %s is not routed: %s", domain, problem)
        if ada is not None:
            # The first prompt would otherwise wait for what is prepared once, and each for a look at whether it is.
            ada.seal()
            ada.route([""])
        self._ada, self._made_of = ada, self._parts(state)
        logger.info("Routing with router %s: %d domains.", state.router, 0 if ada is None else len(ada.domains))

    @staticmethod
    def _parts(state: CatalogState) -> tuple[object, ...]:
        """What the router is made of: a version without prototypes does not change it."""
        versions = {name: state.adapters[name] for name in state.prototypes}
        return state.router, state.adapters.keys(), versions, state.prototypes, state.aliases.keys()
