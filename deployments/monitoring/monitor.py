"""What the Gateway tells of requests: counted while they run, recorded once, when they end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import ZephyraError
from cluster.messages import NONE_DOMAIN, Mixture, RoutingDecision, TokenChunk
from deployments.monitoring.accuracy import Accuracy, Decided, Judged, RecentDecisions
from deployments.monitoring.metrics import (
    ABSTENTIONS,
    ERRORS,
    FEEDBACK,
    FIRST_TOKEN,
    MIXTURE_SIZE,
    PER_TOKEN,
    REQUESTS,
    ROUTING,
    ROUTING_COMPUTE,
    ROUTING_SHARE,
    TOKENS,
    DomainLabels,
    RaySink,
    Sink,
)

BASE, UNROUTED = "base", "unrouted"
"""Labels of what no domain answers: the plain base, and requests that failed before their mixture was fixed."""


class Monitor:
    """One Gateway's metrics, and the decisions that its callers may judge."""

    def __init__(self, sink: Sink | None = None) -> None:
        self.sink = sink or RaySink()
        self.labels = DomainLabels()
        self.probes = Accuracy("probe", self.sink, self.labels)
        self._feedback = Accuracy("feedback", self.sink, self.labels)
        self._recent = RecentDecisions()

    def watch(self) -> "Watch":
        """A request has come."""
        return Watch(self)

    def decided(self, request_id: str, decision: RoutingDecision, routing_ms: float) -> None:
        """The router has decided; asking it took `routing_ms`."""
        self.sink.record(ROUTING, routing_ms / 1000)
        self.sink.record(ROUTING_COMPUTE, decision.compute_ms / 1000)
        self._recent.remember(request_id, Decided.of(decision))
        if not decision.weights:
            domains = {name: value for name, value in decision.probabilities.items() if name != NONE_DOMAIN}
            likeliest = self.labels.of(max(domains, key=domains.__getitem__)) if domains else BASE
            self.sink.record(ABSTENTIONS, 1, domain=likeliest)

    def feedback(self, request_id: str, right: str) -> Judged:
        """Somebody says which domain was right. Raises `UnknownRequest`."""
        judged = Judged(self._recent.take(request_id), right)
        self._feedback.add(judged)
        self.sink.record(FEEDBACK, 1, domain=self.labels.of(right))
        return judged


class Watch:
    """One request, from its arrival to its end."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._start_s = time.perf_counter()
        self._mixture: Mixture | None = None
        self._routing_s = 0.0
        self._first_s = self._last_s = 0.0
        self._num_tokens = 0
        self._ended = False

    def routed(self, mixture: Mixture, routing_ms: float) -> None:
        """Its mixture is fixed; `routing_ms` is 0 where the router was not asked."""
        self._mixture, self._routing_s = mixture, routing_ms / 1000

    def saw(self, chunk: TokenChunk) -> None:
        """Tokens came. All there is on the tokens' path."""
        self._last_s = time.perf_counter()
        if not self._num_tokens:
            self._first_s = self._last_s
        self._num_tokens += len(chunk.token_ids)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """An error inside ends the request, and is counted."""
        try:
            yield
        except ZephyraError as error:
            self._fail(type(error).__name__)
            raise
        except Exception:
            self._fail("Internal")
            raise

    def end(self) -> None:
        """It is over, however; what comes after is not told."""
        if self._ended:
            return
        self._ended = True
        if self._mixture is None:
            return
        record, label = self._monitor.sink.record, self._label()
        record(REQUESTS, 1, domain=label)
        record(MIXTURE_SIZE, len(self._mixture.entries), domain=label)
        if not self._num_tokens:
            return
        record(TOKENS, self._num_tokens, domain=label)
        first_token_s = self._first_s - self._start_s
        record(FIRST_TOKEN, first_token_s, domain=label)
        if self._routing_s:
            record(ROUTING_SHARE, self._routing_s / first_token_s)
        if self._num_tokens > 1:
            record(PER_TOKEN, (self._last_s - self._first_s) / (self._num_tokens - 1), domain=label)

    def _fail(self, error: str) -> None:
        if not self._ended:
            self._monitor.sink.record(ERRORS, 1, domain=self._label(), error=error)
        self.end()

    def _label(self) -> str:
        """The heaviest domain of the mixture."""
        if self._mixture is None:
            return UNROUTED
        if not self._mixture.entries:
            return BASE
        ref, _ = max(self._mixture.entries, key=lambda entry: entry[1])
        return self._monitor.labels.of(ref.domain)
