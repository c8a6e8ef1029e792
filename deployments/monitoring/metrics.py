"""Every metric of Zephyra, declared once; Ray exports each as `ray_<name>`, counters as `ray_<name>_total`.

Times are seconds. Domains become labels through `DomainLabels`, so that the number of series is bounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, cast

from ray.serve import metrics


class Kind(Enum):
    """As Prometheus calls them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


_FROM_A_MILLISECOND = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_FROM_A_TENTH = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
_SHARES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: what it is called, what it says, what it is told apart by."""

    name: str
    kind: Kind
    description: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""

    @property
    def exported(self) -> tuple[str, ...]:
        """The names that Prometheus finds it under."""
        match self.kind:
            case Kind.COUNTER:
                return (f"ray_{self.name}_total",)
            case Kind.GAUGE:
                return (f"ray_{self.name}",)
            case Kind.HISTOGRAM:
                return tuple(f"ray_{self.name}_{part}" for part in ("bucket", "sum", "count"))


def _counter(name: str, description: str, *tags: str) -> Metric:
    return Metric(f"zephyra_{name}", Kind.COUNTER, description, tags)


def _gauge(name: str, description: str, *tags: str) -> Metric:
    return Metric(f"zephyra_{name}", Kind.GAUGE, description, tags)


def _histogram(name: str, description: str, buckets: Sequence[float], *tags: str) -> Metric:
    return Metric(f"zephyra_{name}", Kind.HISTOGRAM, description, tags, tuple(buckets))


REQUESTS = _counter("requests", "Requests whose mixture was fixed.", "domain")
TOKENS = _counter("tokens", "Tokens generated.", "domain")
ERRORS = _counter("errors", "Requests that ended in an error.", "domain", "error")
FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds", "From the request to its first token.", _FROM_A_MILLISECOND, "domain"
)
PER_TOKEN = _histogram("time_per_token_seconds", "Between tokens, the mean of an answer.", _FROM_A_TENTH, "domain")
MIXTURE_SIZE = _counter("mixture_entries", "Adapters of all mixtures: over the requests, the mean size.", "domain")
ABSTENTIONS = _counter("abstentions", "Prompts routed to none, by the domain that was likeliest.", "domain")
ROUTING = _histogram("routing_seconds", "Asking the router, the way there and back included.", _FROM_A_TENTH)
ROUTING_COMPUTE = _histogram("routing_compute_seconds", "Scoring a prompt, inside the router.", _FROM_A_TENTH)
ROUTING_SHARE = _histogram("routing_share", "Share of the time to first token spent in routing.", _SHARES)
ACCURACY = _gauge("routing_accuracy", "Share of routing decisions that were right.", "domain", "source")
CALIBRATION = _gauge("routing_calibration_error", "Mean distance between confidence and accuracy.", "source")
FEEDBACK = _counter("feedback", "Decisions that somebody judged.", "domain")
ADAPTER_LOADS = _counter("adapter_loads", "Adapters that a base replica fetched into its slots.", "domain")
ADAPTERS_RESIDENT = _gauge("adapters_resident", "Adapters in a base replica's slots.", "domain")
ADAPTER_BYTES = _gauge("adapter_bytes", "Bytes of the adapters in a base replica's slots.")
RUNNING = _gauge("sequences_running", "Sequences in a base replica's batch.")
WAITING = _gauge("sequences_waiting", "Sequences in a base replica's queue.")
KV_USED = _gauge("kv_used_share", "Share of a base replica's KV blocks that sequences hold.")
TRAINING_STEP = _gauge("training_step", "Steps of a training stage that are done.", "stage", "run")
TRAINING_LOSS = _gauge("training_loss", "Loss of a training stage's newest steps.", "stage", "run")
TRAINING_SPEED = _gauge("training_per_second", "Tokens or prompts that a training stage learns from.", "stage", "run")

METRICS = tuple(value for value in tuple(globals().values()) if isinstance(value, Metric))


class Sink(Protocol):
    """Where values go."""

    def record(self, metric: Metric, value: float, **tags: str) -> None:
        """Add to a counter, set a gauge, or put into a histogram."""


class RaySink:
    """To Ray, which exports them on each node's metrics port."""

    def __init__(self) -> None:
        self._instruments: dict[str, Any] = {}

    def record(self, metric: Metric, value: float, **tags: str) -> None:
        instrument = self._instruments.get(metric.name)
        if instrument is None:
            instrument = self._instruments[metric.name] = _made(metric)
        match metric.kind:
            case Kind.COUNTER:
                # Ray refuses an increment of nothing.
                if value > 0:
                    instrument.inc(value, tags)
            case Kind.GAUGE:
                instrument.set(value, tags)
            case Kind.HISTOGRAM:
                instrument.observe(value, tags)


def _made(metric: Metric) -> Any:
    # Ray annotates a tuple of one, and takes any.
    tags = cast("tuple[str]", metric.tags)
    match metric.kind:
        case Kind.COUNTER:
            return metrics.Counter(metric.name, metric.description, tags)
        case Kind.GAUGE:
            return metrics.Gauge(metric.name, metric.description, tags)
        case Kind.HISTOGRAM:
            return metrics.Histogram(metric.name, metric.description, list(metric.buckets), tags)


MAX_DOMAIN_LABELS = 50
OTHER = "other"


class DomainLabels:
    """The first domains that are used keep their names; all later ones are `other`."""

    def __init__(self, limit: int = MAX_DOMAIN_LABELS) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def of(self, domain: str) -> str:
        if domain not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(domain)
        return domain
