"""The entrance behind both wires: checks a request, has it routed, fixes its mixture, and starts its answer.

Knows nothing of HTTP, gRPC or OpenAI's shapes; those are translated to and from what is here.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from cluster.classification import ClassifyRequest, LabelScore, label_scores
from cluster.config.places import Root
from cluster.errors import DeadlineExceeded, InvalidMixture, ReplicaLost, RouterUnavailable, UnknownDomain, UnknownModel
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, CatalogState
from cluster.messages import (
    SEEDS,
    AdapterRef,
    AnswerScores,
    ClientRequest,
    GenerateRequest,
    MergeReport,
    Mixture,
    Prompt,
    RoutingDecision,
    ScoreRequest,
    TokenChunk,
    check_prompt,
    check_weights,
    turns_to_route,
)
from deployments import calls
from deployments.catalog_follower import CatalogFollower
from deployments.monitoring.monitor import Monitor, Watch
from deployments.monitoring.probes import Prober
from deployments.router import Router

ROUTER_WAIT_S = 5.0
"""Longer than Serve takes to replace a router that died."""

READY_WAIT_S = 2.0
"""A replica under load says within this that it is well."""

MAX_KNOWN_VERSIONS = 100_000
"""Older versions that need not be looked for again."""

ROUTED_MODEL, BASE_MODEL = "zephyra", "base"


@dataclass(frozen=True, slots=True)
class Routing:
    """Which mixture answers a prompt, and how it came about."""

    mixture: Mixture
    probabilities: Mapping[str, float] | None = None
    """What the router says of every domain and of "none"; None when it was not asked."""
    routing_ms: float = 0.0
    """What asking the router took, the way there and back included; 0 when it was not asked."""
    merged: MergeReport | None = None
    """As `TokenChunk.merged`, of an answer; None where each adapter answers as it is."""
    request_id: str = ""
    """By which a client may later say which domain was right; empty when the router was not asked."""


@dataclass(frozen=True, slots=True)
class Classification:
    """How likely each label is, and who judged."""

    scores: tuple[LabelScore, ...]
    """In the order in which the labels were given."""
    routing: Routing
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of one of the choices."""

    index: int
    """Which choice, from 0."""
    chunk: TokenChunk


class Answer:
    """An answer under way: one choice, or several to one prompt, whose pieces come as they are made.

    The first piece is there already, so whatever was wrong with the request has been raised. Must be closed
    (`contextlib.aclosing`): closing it early takes all its sequences out of the batch.
    """

    def __init__(self, routing: Routing, first: Piece, rest: AsyncGenerator[Piece, None], watch: Watch) -> None:
        self.routing = routing
        self._first = first
        self._rest = rest
        self._watch = watch
        watch.saw(first.chunk)

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces, once. An error of one choice ends all of them."""
        yield self._first
        with self._watch.failing():
            async for piece in self._rest:
                self._watch.saw(piece.chunk)
                yield piece

    async def aclose(self) -> None:
        """Give up on what has not come yet."""
        self._watch.end()
        await self._rest.aclose()


class Gateway:
    """Turns a `ClientRequest` into an `Answer`, a `ClassifyRequest` into a `Classification`.

    Must be made inside a running event loop.
    """

    def __init__(
        self,
        router: calls.Handle,
        replica: calls.Handle,
        root: Root,
        router_wait_s: float = ROUTER_WAIT_S,
        own_router: Router | None = None,
    ) -> None:
        """`own_router` decides on what is short; the one behind the handle on everything else."""
        self._route = calls.method(router, "route")
        self._route_conversation = calls.method(router, "route_conversation")
        self._check_replica = calls.method(replica, "check_health")
        self._generate = calls.method(replica, "generate", stream=True)
        self._score = calls.method(replica, "score", stream=True)
        self._router_wait_s = router_wait_s
        self._own_router = own_router
        self._store = Store(root)
        self._catalog = CatalogFollower(Catalog(self._store))
        self._known_versions: set[AdapterRef] = set()
        self.monitor = Monitor()
        self.prober = Prober(self._store, lambda: self.state, self._decisions, self.monitor.probes)

    @property
    def state(self) -> CatalogState:
        """The catalog as this Gateway sees it, at most 250 ms old."""
        return self._catalog.state

    def models(self) -> list[str]:
        """Every name that a request's `model` may have."""
        names = sorted({*self.state.adapters, *self.state.aliases})
        return [BASE_MODEL, ROUTED_MODEL, *(f"{ROUTED_MODEL}:{name}" for name in names)]

    async def check_ready(self) -> None:
        """Raise `ReplicaLost` while no base replica is there to answer."""
        lost = ReplicaLost("No base replica is ready; try again in a few seconds.")
        await calls.call(self._check_replica, timeout_s=READY_WAIT_S, lost=lost)

    async def answer(self, request: ClientRequest) -> Answer:
        """Start answering. Raises the `ZephyraError` that says what is wrong with the request or with the cluster."""
        watch = self.monitor.watch()
        with watch.failing():
            routing, left_s = await self._routed(request, watch)
            resolved = _resolved(request, routing.mixture, left_s)
            lost = ReplicaLost("The base replica died before the answer was complete; send the request again.")
            pieces = _interleaved([calls.stream(self._generate, one, lost=lost) for one in resolved])
            first = await anext(pieces)
        return Answer(replace(routing, merged=first.chunk.merged), first, pieces, watch)

    async def classify(self, request: ClassifyRequest) -> Classification:
        """Score the labels, all on one replica. Raises as `answer` does."""
        watch = self.monitor.watch()
        try:
            with watch.failing():
                asked = request.asked
                routing, left_s = await self._routed(asked, watch)
                resolved = ScoreRequest(
                    uuid.uuid4().hex, asked.prompt, routing.mixture, request.labels, asked.priority, left_s
                )
                lost = ReplicaLost("The base replica died before all labels were scored; send the request again.")
                answers: list[AnswerScores] = [item async for item in calls.stream(self._score, resolved, lost=lost)]
        finally:
            watch.end()
        (scored,) = answers
        scores = label_scores(request.labels, scored.scores, request.normalize)
        return Classification(scores, replace(routing, merged=scored.merged), scored.prompt_tokens)

    async def route(self, prompt: Prompt) -> Routing:
        """What the router would answer `prompt` with."""
        check_prompt(prompt)
        start_s = time.perf_counter()
        decision = await self._decision(list(turns_to_route(prompt)))
        routing_ms = (time.perf_counter() - start_s) * 1000
        request_id = uuid.uuid4().hex
        routing = Routing(self._current(decision.weights), decision.probabilities, routing_ms, request_id=request_id)
        self.monitor.decided(request_id, decision, routing_ms)
        return routing

    async def _routed(self, request: ClientRequest, watch: Watch) -> tuple[Routing, float | None]:
        """Who answers, and what is left of the client's time. Raises `DeadlineExceeded` if nothing is."""
        check_prompt(request.prompt)
        start_s = time.perf_counter()
        routing = await self._routing(request)
        watch.routed(routing.mixture, routing.routing_ms)
        if request.timeout_s is None:
            return routing, None
        left_s = request.timeout_s - (time.perf_counter() - start_s)
        if left_s <= 0:
            why = f"The request was not routed within its timeout_s of {request.timeout_s:g}; allow more."
            raise DeadlineExceeded(why)
        return routing, left_s

    async def _decision(self, turns: list[str]) -> RoutingDecision:
        if self._own_router is not None and (ada := self._own_router.at_hand(turns)) is not None:
            return ada.route_conversation(turns)
        if len(turns) == 1:
            (decision,) = await self._decisions(turns)
            return decision
        of_turns: RoutingDecision = await self._ask_router(self._route_conversation, turns)
        return of_turns

    async def _decisions(self, texts: Sequence[str]) -> list[RoutingDecision]:
        decisions: list[RoutingDecision] = await self._ask_router(self._route, texts)
        return decisions

    async def _ask_router(self, remote: calls.Handle, texts: Sequence[str]) -> Any:
        wait_s = self._router_wait_s
        lost = RouterUnavailable(f"The router did not answer within {wait_s:g} s; try again, or name a model.")
        return await calls.read(remote, list(texts), timeout_s=wait_s, lost=lost)

    async def _routing(self, request: ClientRequest) -> Routing:
        domain = self._domain_of_model(request.model)
        if request.mixture is not None:
            return Routing(await self._mixture(request.mixture))
        if domain is not None:
            return Routing(await self._mixture({domain: 1.0}))
        if request.model == BASE_MODEL:
            return Routing(Mixture())
        return await self.route(request.prompt)

    def _domain_of_model(self, model: str) -> str | None:
        """The domain that `model` names, None for the router or the base. Raises `UnknownModel`."""
        family, colon, domain = model.partition(":")
        if model in (ROUTED_MODEL, BASE_MODEL):
            return None
        if family != ROUTED_MODEL or not colon:
            raise UnknownModel(f"There is no model {model!r}; the models are: {', '.join(self.models())}.")
        return domain

    async def _mixture(self, weights: Mapping[str, float]) -> Mixture:
        """The mixture a client asked for, its names resolved. Raises `InvalidMixture` or `UnknownDomain`."""
        check_weights(weights)
        resolved: dict[AdapterRef, float] = {}
        for name, weight in weights.items():
            ref = await self._resolve(name)
            if ref in resolved:
                raise InvalidMixture(f"The mixture names {ref} twice, once as {name!r}; give each adapter one weight.")
            resolved[ref] = weight
        return Mixture.of(resolved)

    async def _resolve(self, name: str) -> AdapterRef:
        """`domain` or an alias as its current version; `domain@version` or `domain@tag` as that, if published."""
        ref = self.state.resolve(name)
        if self.state.adapters.get(ref.domain) == ref.version or ref in self._known_versions:
            return ref
        # Asking a bucket takes a while; a version that was there once is there for good.
        if not await asyncio.to_thread(self._store.has_adapter, ref):
            raise UnknownDomain(f"There is no adapter {ref}; ask for a version that was published.")
        if len(self._known_versions) >= MAX_KNOWN_VERSIONS:
            self._known_versions.clear()
        self._known_versions.add(ref)
        return ref

    def _current(self, weights: Mapping[str, float]) -> Mixture:
        """The router's weights over current versions, those of a domain and its aliases together. A domain withdrawn a
        moment ago is left out of them.
        """
        state, known = self.state, dict[AdapterRef, float]()
        for name, weight in weights.items():
            domain = state.aliases.get(name, name)
            if domain in state.adapters:
                ref = state.ref(domain)
                known[ref] = known.get(ref, 0.0) + weight
        total = sum(known.values())
        return Mixture.of(known if total == sum(weights.values()) else {ref: w / total for ref, w in known.items()})


def _resolved(request: ClientRequest, mixture: Mixture, left_s: float | None) -> list[GenerateRequest]:
    """One request per choice."""
    seed = request.sampling.seed
    return [
        # The client's own request id may come twice; the engine's may not.
        GenerateRequest(
            uuid.uuid4().hex,
            request.prompt,
            mixture,
            # Without a seed the engine gives each its own.
            request.sampling if seed is None else replace(request.sampling, seed=(seed + index) % SEEDS),
            request.priority,
            left_s,
        )
        for index in range(request.num_choices)
    ]


async def _interleaved(streams: Sequence[AsyncGenerator[TokenChunk, None]]) -> AsyncGenerator[Piece, None]:
    """The chunks of all streams as they come. An error of one, or closing this early, ends them all."""
    if len(streams) == 1:  # what most ask for, and waiting for the first of one costs a task for each token
        async with aclosing(streams[0]) as only:
            async for next_chunk in only:
                yield Piece(0, next_chunk)
        return
    awaited = {asyncio.ensure_future(anext(stream, None)): index for index, stream in enumerate(streams)}
    try:
        while awaited:
            done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=awaited.__getitem__):
                chunk = await task
                index = awaited.pop(task)
                if chunk is not None:
                    awaited[asyncio.ensure_future(anext(streams[index], None))] = index
                    yield Piece(index, chunk)
    finally:
        for task in awaited:
            task.cancel()
        await asyncio.gather(*awaited, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
