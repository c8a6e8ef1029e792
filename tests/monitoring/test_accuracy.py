"""Judgements: their gauges against plain sums and another implementation, their memory against its bound."""

import numpy as np
import pytest

from benchmarks.router_metrics import calibration_error as reference_calibration_error
from cluster.errors import UnknownRequest
from cluster.messages import RoutingDecision
from deployments.monitoring.accuracy import WINDOW, Accuracy, Decided, Judged, RecentDecisions, calibration_error
from deployments.monitoring.metrics import (
    ABSTENTIONS,
    ACCURACY,
    CALIBRATION,
    FEEDBACK,
    MAX_DOMAIN_LABELS,
    OTHER,
    ROUTING,
    ROUTING_COMPUTE,
    DomainLabels,
)
from deployments.monitoring.monitor import Monitor
from tests.monitoring.ledger import Ledger


def test_the_calibration_error_is_that_of_another_implementation():
    random = np.random.default_rng(0)
    confidence_B, right_B = random.random(500), random.random(500) < 0.6
    judged = [
        Judged(Decided("law", float(confidence)), "law" if right else "math")
        for confidence, right in zip(confidence_B, right_B, strict=True)
    ]
    expected = reference_calibration_error(confidence_B, right_B, num_bins=10)
    assert calibration_error(judged) == pytest.approx(expected, abs=1e-12)
    assert calibration_error([Judged(Decided("law", 1.0), "law")]) == 0.0


def test_accuracy_is_of_the_last_judgements_of_the_right_domain():
    ledger = Ledger()
    accuracy = Accuracy("feedback", ledger, DomainLabels())
    for right in ["law"] * 3 + ["math"]:
        accuracy.add(Judged(Decided("law", 1.0), right))
    assert ledger.sum(ACCURACY, "law", "feedback") == 1.0
    assert ledger.sum(ACCURACY, "math", "feedback") == 0.0
    assert ledger.sum(CALIBRATION, "feedback") == pytest.approx(0.25)
    for _ in range(WINDOW):
        accuracy.add(Judged(Decided("math", 1.0), "law"))
    assert ledger.sum(ACCURACY, "law", "feedback") == 0.0


def test_a_decision_is_judged_once_and_only_the_last_are_remembered():
    recent = RecentDecisions(limit=2)
    for name in "abc":
        recent.remember(name, Decided(name, 0.5))
    assert recent.take("c").domain == "c"
    for gone in ("a", "c", "never"):
        with pytest.raises(UnknownRequest, match="once"):
            recent.take(gone)


def test_the_monitor_knows_what_was_decided_and_who_was_turned_away():
    ledger = Ledger()
    monitor = Monitor(ledger)
    decisions = {
        "one": RoutingDecision({"law": 0.7, "math": 0.2, "none": 0.1}, {"law": 0.75, "math": 0.25}, compute_ms=0.5),
        "two": RoutingDecision({"law": 0.1, "math": 0.2, "none": 0.7}, {}, compute_ms=0.5),
        "three": RoutingDecision({"none": 1.0}, {}),
    }
    for request_id, decision in decisions.items():
        monitor.decided(request_id, decision, routing_ms=2.0)
    assert (ledger.sum(ROUTING), ledger.sum(ROUTING_COMPUTE)) == pytest.approx((0.006, 0.001))
    assert (ledger.sum(ABSTENTIONS, "math"), ledger.sum(ABSTENTIONS, "base")) == (1, 1)
    assert monitor.feedback("one", "law").is_right
    assert monitor.feedback("two", "none").is_right
    assert monitor.feedback("three", "math").decided == Decided("none", 1.0)
    assert [ledger.sum(FEEDBACK, right) for right in ("law", "none", "math")] == [1, 1, 1]


def test_the_number_of_labels_is_bounded():
    labels = DomainLabels()
    named = {labels.of(f"domain{number}") for number in range(1000)}
    assert len(named) == MAX_DOMAIN_LABELS + 1
    assert labels.of("domain0") == "domain0"
    assert labels.of("domain999") == OTHER
