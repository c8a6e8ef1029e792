"""The router's report against the same figures counted another way."""

import math

import numpy as np
import pytest

from cluster.errors import InvalidData
from cluster.messages import NONE_DOMAIN, RoutingDecision
from cluster.router.tiny_ada import TinyAda
from cluster.training.data import Row
from cluster.training.router_evaluation import NUM_BINS, calibration_error, evaluate_router
from tests.router.prompts import STRANGE, prompts


def _rows() -> list[Row]:
    """Right and wrong labels: every seventh prompt is said to belong to the next domain."""
    texts, domains = prompts("val", 12, seed=9)
    order = sorted(set(domains))
    wrong = [order[(order.index(name) + 1) % len(order)] if i % 7 == 0 else name for i, name in enumerate(domains)]
    labelled = [*zip(wrong, texts, strict=True), *((NONE_DOMAIN, text) for text in STRANGE)]
    return [Row(domain, "not read", "", text) for domain, text in (*labelled, ("opera", "unknown to the router"))]


def test_the_report_counts_right(ada: TinyAda) -> None:
    rows = _rows()
    report = evaluate_router(ada, rows, "val")
    found = {
        row: max(w := ada.route([row.bare_prompt])[0].weights, key=w.__getitem__, default=NONE_DOMAIN) for row in rows
    }
    known = [row for row in rows if row.domain in ada.domains]
    assert report.accuracy == pytest.approx(np.mean([found[row] == row.domain for row in known]))
    assert report.turned_away == pytest.approx(np.mean([found[row] == NONE_DOMAIN for row in known]))
    assert set(report.domains) == set(ada.domains)
    for name, domain in report.domains.items():
        own = [row for row in known if row.domain == name]
        assert domain.rows == len(own)
        assert domain.right == pytest.approx(np.mean([found[row] == name for row in own]))
        assert domain.turned_away == pytest.approx(np.mean([found[row] == NONE_DOMAIN for row in own]))
    assert report.none_rows == len(STRANGE)
    assert report.none_to_base == np.mean([found[row] == NONE_DOMAIN for row in rows if row.domain == NONE_DOMAIN])
    wrong = [row for row in rows[:-1] if found[row] not in (row.domain, NONE_DOMAIN)]
    assert sum(one.rows for one in report.confusions) == len(wrong) > 0
    for one in report.confusions:
        alike = [row.bare_prompt for row in wrong if (row.domain, found[row]) == (one.domain, one.routed_to)]
        assert (one.rows, one.example) == (len(alike), alike[0])
    assert report.p50_ms > 0


def test_rows_of_no_known_domain_are_nothing_to_measure(ada: TinyAda) -> None:
    with pytest.raises(InvalidData, match=r"no dev rows of cooking.*--split"):
        evaluate_router(ada, [Row(NONE_DOMAIN, "", "", "hi"), Row("opera", "", "", "hi")], "dev")


def test_calibration_error_by_hand_and_as_drawn() -> None:
    def decision(confidence: float) -> RoutingDecision:
        return RoutingDecision({"a": confidence, NONE_DOMAIN: 1 - confidence}, {})

    # Three prompts at 0.9, of which two are right, and one at 0.6, which is right: (3 * |0.9 - 2/3| + 0.4) / 4.
    four = [decision(0.9)] * 3 + [decision(0.6)]
    assert calibration_error(four, ["a", "a", NONE_DOMAIN, "a"]) == pytest.approx((0.7 + 0.4) / 4)
    assert calibration_error([decision(1.0)] * 2, ["a", "a"]) == 0.0
    # Labels drawn with the probabilities that are told: what is left is the noise of so many draws.
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.5, 1.0, 20_000)
    drawn = ["a" if hit else NONE_DOMAIN for hit in rng.random(20_000) < confidences]
    assert calibration_error([decision(float(c)) for c in confidences], drawn) < 2 * math.sqrt(NUM_BINS / 20_000)
