"""Keeps what is recorded, as Ray's exporter would add it up."""

from collections import defaultdict

from deployments.monitoring.metrics import Kind, Metric


class Ledger:
    """A sink whose values a test can look at."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def record(self, metric: Metric, value: float, **tags: str) -> None:
        assert set(tags) == set(metric.tags), f"{metric.name} is told apart by {metric.tags}"
        key = (metric.name, *(tags[tag] for tag in metric.tags))
        if metric.kind is Kind.GAUGE:
            self.values[key].clear()
        self.values[key].append(value)

    def sum(self, metric: Metric, *tags: str) -> float:
        return sum(self.values[(metric.name, *tags)])

    def count(self, metric: Metric, *tags: str) -> int:
        return len(self.values[(metric.name, *tags)])
