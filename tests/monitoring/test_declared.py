"""The dashboard and the alert rules name only metrics and labels that are declared, and can be read."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from cluster.config.places import CHECKOUT
from deployments.monitoring.metrics import METRICS

FOLDER = CHECKOUT / "monitoring"
LABELS_OF_RAY = {"deployment", "replica", "application", "le", "instance", "job"}
BY_NAME = {name: metric for metric in METRICS for name in metric.exported}


def expressions():
    panels = json.loads((FOLDER / "zephyra_dashboard.json").read_text())["panels"]
    dashboard = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return dashboard, [rule["expr"] for group in groups for rule in group["rules"]]


def names_in(expression):
    return set(re.findall(r"\bray_zephyra_\w+", expression))


def test_every_metric_that_is_shown_or_watched_is_declared():
    dashboard, rules = expressions()
    assert len(dashboard) > 10
    assert len(rules) > 4
    for expression in dashboard + rules:
        names = names_in(expression)
        assert names, expression
        assert names <= set(BY_NAME), expression
        allowed = set().union(*(BY_NAME[name].tags for name in names)) | LABELS_OF_RAY
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in labels.split(",")} <= allowed, expression


def test_every_declared_metric_is_shown():
    shown = {BY_NAME[name] for expression in expressions()[0] for name in names_in(expression)}
    assert shown == set(METRICS)


def test_names_differ_and_none_takes_a_label_of_rays():
    assert len(BY_NAME) == sum(len(metric.exported) for metric in METRICS)
    for metric in METRICS:
        assert not set(metric.tags) & {"deployment", "replica", "application", "route"}


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    dashboard = json.loads((FOLDER / "zephyra_dashboard.json").read_text())
    assert dashboard["uid"] == "zephyra"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_alert_says_how_bad_and_what_to_do():
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert set(rule["annotations"]) == {"summary", "description"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_prometheus_takes_the_rules():
    subprocess.run(["promtool", "check", "rules", FOLDER / "alerts.yml"], check=True)
