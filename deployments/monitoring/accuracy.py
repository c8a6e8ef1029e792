"""How right the router is: its decisions beside the domains that were right, and what its confidence is worth."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.errors import UnknownRequest
from cluster.messages import NONE_DOMAIN, RoutingDecision
from cluster.router import reliability
from deployments.monitoring.metrics import ACCURACY, CALIBRATION, DomainLabels, Sink

MAX_REMEMBERED = 10_000
"""Decisions that wait for somebody's judgement."""

WINDOW = 1000
"""Accuracy is that of so many last judgements of a domain."""

_BINS = 10


@dataclass(frozen=True, slots=True)
class Decided:
    """What the router decided of one prompt."""

    domain: str
    """The heaviest of the mixture, or none."""
    confidence: float
    """The probability that it gave to that domain."""

    @classmethod
    def of(cls, decision: RoutingDecision) -> "Decided":
        weights = decision.weights
        domain = max(weights, key=weights.__getitem__) if weights else NONE_DOMAIN
        return cls(domain, decision.probabilities.get(domain, 0.0))


@dataclass(frozen=True, slots=True)
class Judged:
    """A decision beside the domain that was right."""

    decided: Decided
    right: str

    @property
    def is_right(self) -> bool:
        return self.decided.domain == self.right


class RecentDecisions:
    """The last decisions by request id, each until it is judged."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._decided: OrderedDict[str, Decided] = OrderedDict()

    def remember(self, request_id: str, decided: Decided) -> None:
        self._decided[request_id] = decided
        if len(self._decided) > self._limit:
            self._decided.popitem(last=False)

    def take(self, request_id: str) -> Decided:
        """Each counts once. Raises `UnknownRequest`."""
        try:
            return self._decided.pop(request_id)
        except KeyError:
            raise UnknownRequest(
                f"No routed request {request_id[:64]!r} waits for feedback; send the request_id of one of the last "
                f"{self._limit} that the router decided on, once."
            ) from None


class Accuracy:
    """The gauges of one source of judgements."""

    def __init__(self, source: str, sink: Sink, labels: DomainLabels) -> None:
        self._source, self._sink, self._labels = source, sink, labels
        self._judged: dict[str, deque[Judged]] = {}

    def add(self, judged: Judged) -> None:
        """One more, which the gauges tell at once."""
        label = self._labels.of(judged.right)
        self._judged.setdefault(label, deque(maxlen=WINDOW)).append(judged)
        self._tell([label])

    def replace(self, all_judged: Iterable[Judged]) -> None:
        """Forget what was before. A domain without a judgement keeps the last value that was told."""
        self._judged.clear()
        for judged in all_judged:
            self._judged.setdefault(self._labels.of(judged.right), deque()).append(judged)
        self._tell(self._judged)

    def _tell(self, labels: Iterable[str]) -> None:
        for label in labels:
            of_one = self._judged[label]
            share = sum(judged.is_right for judged in of_one) / len(of_one)
            self._sink.record(ACCURACY, share, domain=label, source=self._source)
        everything = [judged for of_one in self._judged.values() for judged in of_one]
        if everything:
            self._sink.record(CALIBRATION, calibration_error(everything), source=self._source)


def calibration_error(all_judged: Iterable[Judged]) -> float:
    """Of the decisions' confidence, over ten bins."""
    return reliability.calibration_error(((judged.decided.confidence, judged.is_right) for judged in all_judged), _BINS)
