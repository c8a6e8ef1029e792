"""The benchmark of the adapter plane: the whole command, little of everything, and what it may be asked.

No speed is asserted: only that every figure is there, and those that do not depend on the machine.
"""

import json
import math
from pathlib import Path

import pytest

from benchmarks.adapters import BARS, SCENARIOS, main
from benchmarks.catalog_size import catalog_size


def test_the_quick_run_gives_every_figure_and_merging_keeps_its_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "--only", "merging", "--threads", "1", "--json", str(tmp_path / "figures.json")])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    assert result.keys() == {"merge_exact_over_optimum", "merge_random_over_optimum", "certificate_violations"}
    assert all(math.isfinite(value) for value in result.values())
    assert 1 - 1e-6 <= result["merge_exact_over_optimum"] <= BARS["merge_exact_over_optimum"].value
    assert 1 - 1e-6 <= result["merge_random_over_optimum"] <= BARS["merge_random_over_optimum"].value
    assert result["certificate_violations"] == 0
    kept = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert kept["merge_random_over_optimum"]["value"] == pytest.approx(result["merge_random_over_optimum"])
    for words in ("exact, bfloat16", "tree, float32", "randomized, float32", "dense_sum"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], "expected at least 1"),
        (["--blocks", "0"], "expected at least 1"),
        (["--json", "/no/such/folder/figures.json"], "make it first"),
    ],
)
def test_what_cannot_be_run_ends_with_a_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--quick", *arguments])
    assert ended.value.code == 1
    assert words in " ".join(capsys.readouterr().err.split())


def test_every_scenario_is_described() -> None:
    assert all(scenario.what for scenario in SCENARIOS.values())


def test_one_more_domain_writes_as_many_bytes_however_many_there_are() -> None:
    figures = {name: measurement.value for name, measurement in catalog_size(many=40).items()}
    assert figures["publish_bytes_40"] == figures["publish_bytes_10"] < 1000
    assert figures["snapshot_bytes_40"] > figures["snapshot_bytes_10"]
    assert {"catalog_load_s", "router_assembly_s", "router_assembly_one_more_s"} <= figures.keys()
