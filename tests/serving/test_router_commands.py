"""`zephyra router evaluate|explain` print and write what the functions behind them find."""

import json

import pytest
from typer.testing import CliRunner

from cluster.router.explanation import explain
from deployments.cli import app
from tests.nano import build_root, publish_router
from tests.training.rows import write_parquet

PROMPTS = ["is this contract valid", "the judge [bold]ruled\x1b[31m", "solve the equation", "tell me a joke"]
DATA = {
    "prompt": [*PROMPTS, "sue my landlord", "prove the theorem"],
    "domain": ["law", "law", "math", "none", "law", "math"],
    "response": ["so it is"] * 6,
    "split": [*["test"] * 4, "train", "train"],
}


def router(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["router", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def ada_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("router") / "root"
    return root, publish_router(build_root(root))


def test_evaluate_prints_and_writes_the_report(ada_root, tmp_path):
    root, ada = ada_root
    (tmp_path / "data").mkdir()
    data = write_parquet(tmp_path / "data", **DATA)
    done = router("evaluate", "--root", root, "--data", data, "--json", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    found = [max(d.weights, key=d.weights.get, default="none") for d in ada.route(PROMPTS)]
    assert report["domains"]["law"] == {
        "rows": 2,
        "right": found[:2].count("law") / 2,
        "turned_away": found[:2].count("none") / 2,
    }
    assert (report["none_rows"], report["parameters"]) == (1, ada.num_parameters)
    assert f"accuracy {report['accuracy']:.2%}" in done.output
    assert "\x1b[31m" not in done.output
    one = router("evaluate", "--root", root, "--data", data, "--split", "val")
    assert one.exit_code == 1
    assert "no val rows" in one.output


def test_explain_prints_and_writes_the_explanation(ada_root, tmp_path):
    root, ada = ada_root
    prompt = "is this contract valid, [bold]judge[/bold]?"
    done = router("explain", prompt, "--root", root, "--json", tmp_path / "why.json")
    assert done.exit_code == 0, done.output
    expected = explain(ada, prompt)
    written = json.loads((tmp_path / "why.json").read_text())
    assert written["domain"] == expected.domain
    assert [effect["text"] for effect in written["effects"]] == [effect.text for effect in expected.effects]
    assert written["decision"]["probabilities"] == expected.decision.probabilities
    for name, weight in expected.decision.weights.items():
        assert f"{name} {weight:.0%}" in done.output
    for effect in expected.effects[:12]:
        assert f"{effect.effect:+.2f}" in done.output
    assert f"{expected.nearest[0].product:.3f}" in done.output
    against = router("explain", prompt, "--root", root, "--against", "opera")
    assert against.exit_code == 1
    assert "knows no domain 'opera'" in against.output
