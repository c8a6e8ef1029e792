"""Published evaluations: what is written is read back the same in every form, and only what is worse is told."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.errors import CorruptArtifact
from cluster.router.reliability import Bin
from cluster.training.evaluation import DomainReport, ExactMatch, Losses, Report
from cluster.training.evaluation_history import Change, became_worse, last_like, publish_report, read_report
from cluster.training.router_evaluation import DomainRouting, RouterReport


def domain_report(
    routed: float = 0.5, oracle: float = 0.4, right: float = 1.0, exact: float | None = 0.9
) -> DomainReport:
    match = None if exact is None else ExactMatch(0.0, exact, exact, 0.0, "law")
    return DomainReport(100, right, 0.0, 1.0, Losses(2.0, routed, oracle, 3.0, "law", 2.0), match)


def report(data: str = "abc", **domains: DomainReport) -> Report:
    names = [*domains, "none"]
    counts = {name: {name: 9, "none": 1} for name in domains} | {"none": {"none": 4}}
    of_router = RouterReport(
        "test", 10, {name: DomainRouting(10, 0.9, 0.1) for name in domains}, 0.9, 0.1, 4, 1.0, 0.02, (),
        counts, (Bin(40, 0.9, 0.9), Bin(0, 0.0, 0.0)), float(len(names)), 0.3,
    )  # fmt: skip
    return Report(7, "test", data, 100, domains, of_router)


class Cells(HTMLParser):
    """The texts of a page's table cells, and those of cells that are marked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.marked: list[str] = []
        self._open: bool | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        if tag == "td":
            self._open = ("class", "worse") in attributes

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._open = None

    def handle_data(self, text: str) -> None:
        if self._open is not None:
            self.cells.append(text.strip())
            if self._open:
                self.marked.append(text.strip())


def test_json_parquet_and_page_say_the_same(tmp_path: Path) -> None:
    given = report(law=domain_report(routed=0.512), math=domain_report(exact=None))
    folder = publish_report(tmp_path, given, [Change("law", "routed loss", 0.4, 0.512)])
    assert folder == tmp_path / "evaluations/1"
    assert read_report(folder) == given
    rows = {row["domain"]: row for row in pq.read_table(folder / "report.parquet").to_pylist()}
    assert {name: row["loss_routed"] for name, row in rows.items()} == {"law": 0.512, "math": 0.5}
    assert rows["math"]["exact_routed"] is None
    assert rows["law"]["regret"] == pytest.approx(0.112)
    page = (folder / "report.html").read_text()
    cells = Cells(page)
    assert {"law", "math", "0.512", "+0.1120"} <= set(cells.cells)
    assert cells.marked == ["0.512"]
    assert page.count("<svg") == 3


def test_the_last_one_on_the_same_rows_is_found(tmp_path: Path) -> None:
    old, other, new = report(law=domain_report()), report("other", law=domain_report()), report(law=domain_report(0.6))
    assert last_like(tmp_path, new) is None
    publish_report(tmp_path, old, [])
    publish_report(tmp_path, other, [])
    found = last_like(tmp_path, new)
    assert found is not None
    assert (found.name, found.report) == ("evaluations/1", old)
    assert last_like(tmp_path, replace(new, rows_per_domain=50)) is None


def test_only_what_is_worse_beyond_chance_is_told() -> None:
    before = report(law=domain_report(), math=domain_report(), sql=domain_report(exact=0.5))
    same = report(
        law=domain_report(routed=0.5049, right=0.981), math=domain_report(routed=0.1), sql=domain_report(exact=0.37)
    )
    assert became_worse(before, same) == []
    worse = report(law=domain_report(routed=0.506, right=0.9), sql=domain_report(oracle=0.41, exact=0.35))
    told = {(one.domain, one.figure): (one.before, one.now) for one in became_worse(before, worse)}
    assert told == {
        ("law", "routed loss"): (0.5, 0.506),
        ("law", "routed right"): (1.0, 0.9),
        ("math", "routed loss"): (0.5, None),
        ("sql", "own adapter's loss"): (0.4, 0.41),
        ("sql", "exact answers"): (0.5, 0.35),
    }


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    folder = publish_report(tmp_path, report(law=domain_report()), [])
    content = json.loads((folder / "report.json").read_text())
    del content["domains"]["law"]["loss"]
    (folder / "report.json").write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match="evaluation in 1"):
        read_report(folder)
