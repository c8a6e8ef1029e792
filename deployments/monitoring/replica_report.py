"""What a base replica tells of itself: its adapters, its queue, its KV cache."""

from collections import Counter

from cluster.engine.engine import EngineStats
from cluster.lora.merging import is_merged
from cluster.messages import AdapterRef
from deployments.monitoring.metrics import (
    ADAPTER_BYTES,
    ADAPTER_LOADS,
    ADAPTERS_RESIDENT,
    KV_USED,
    RUNNING,
    WAITING,
    DomainLabels,
    RaySink,
    Sink,
)

MERGED = "merged"
"""Label of all mixtures that were merged to one adapter."""


class ReplicaReport:
    """The metrics of one base replica."""

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink or RaySink()
        self._labels = DomainLabels()
        self._told: set[str] = set()

    def loaded(self, ref: AdapterRef) -> None:
        """An adapter was fetched for the engine."""
        self._sink.record(ADAPTER_LOADS, 1, domain=self._label(ref))

    def tell(self, stats: EngineStats) -> None:
        """Set the gauges; a domain that left the slots is told as 0."""
        resident = Counter(self._label(ref) for ref in stats.resident_adapters)
        for label in self._told | set(resident):
            self._sink.record(ADAPTERS_RESIDENT, resident[label], domain=label)
        self._told = set(resident)
        self._sink.record(ADAPTER_BYTES, stats.adapter_bytes)
        self._sink.record(RUNNING, stats.num_running)
        self._sink.record(WAITING, stats.num_waiting)
        self._sink.record(KV_USED, stats.kv_used_share)

    def _label(self, ref: AdapterRef) -> str:
        return MERGED if is_merged(ref) else self._labels.of(ref.domain)
