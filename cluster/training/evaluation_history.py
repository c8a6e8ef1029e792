"""Evaluations that were published: JSON, Parquet and a page with plots, numbered, below the root they are of; and what
became worse since the last one on the same rows.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from cluster.errors import CorruptArtifact
from cluster.lora.store import LocalStorage
from cluster.training.evaluation import DomainReport, Report
from cluster.training.evaluation_page import page

FOLDER = "evaluations"
_JSON, _PARQUET, _PAGE = "report.json", "report.parquet", "report.html"
_REPORT: TypeAdapter[Report] = TypeAdapter(Report)

LOSS_TOLERANCE = 0.01
"""A loss may rise by this share of itself before it counts as worse."""
SHARE_TOLERANCE = 0.02
"""A share of rows may fall by this, or by two standard errors of the difference if that is more."""


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of one domain that is worse than it was."""

    domain: str
    figure: str
    before: float
    now: float | None
    """None where the domain is gone."""


@dataclass(frozen=True, slots=True)
class Published:
    """An evaluation in its folder."""

    name: str
    """evaluations/3"""
    report: Report


def write_report(report: Report, changes: list[Change], folder: Path) -> None:
    """Write the three files into `folder`, which exists."""
    (folder / _JSON).write_bytes(_REPORT.dump_json(report, indent=2))
    pq.write_table(pa.Table.from_pylist([_row(report, *item) for item in report.domains.items()]), folder / _PARQUET)
    (folder / _PAGE).write_text(page(report, [(one.domain, one.figure) for one in changes]))


def publish_report(root: Path, report: Report, changes: list[Change]) -> Path:
    """Write it as the root's next evaluation, complete or not at all; returns its folder."""
    storage = LocalStorage(root)
    version = storage.write_version(FOLDER, lambda draft: write_report(report, changes, draft))
    return root / FOLDER / str(version)


def last_like(root: Path, report: Report) -> Published | None:
    """The newest evaluation on the very rows that `report` was measured on, None if there is none."""
    storage = LocalStorage(root)
    for version in sorted((int(name) for name in storage.names(FOLDER) if name.isdecimal()), reverse=True):
        name = f"{FOLDER}/{version}"
        before = read_report(root / name)
        if (before.data, before.split, before.rows_per_domain) == (report.data, report.split, report.rows_per_domain):
            return Published(name, before)
    return None


def read_report(folder: Path) -> Report:
    """What `write_report` wrote. Raises `CorruptArtifact`."""
    try:
        return _REPORT.validate_json((folder / _JSON).read_bytes())
    except (OSError, ValidationError) as error:
        raise CorruptArtifact(f"The evaluation in {folder.name} cannot be read; remove that folder.") from error


def became_worse(before: Report, now: Report) -> list[Change]:
    """Figures that are worse by more than chance and rounding account for, and domains that are gone."""
    changes: list[Change] = []
    for domain, then in before.domains.items():
        if (today := now.domains.get(domain)) is None:
            changes.append(Change(domain, "routed loss", then.loss.routed, None))
        else:
            changes += _worse(domain, then, today)
    return changes


def _worse(domain: str, then: DomainReport, today: DomainReport) -> list[Change]:
    losses = {
        "routed loss": (then.loss.routed, today.loss.routed),
        "own adapter's loss": (then.loss.oracle, today.loss.oracle),
    }
    shares = {"routed right": (then.routed_right, today.routed_right)}
    if then.exact_match is not None and today.exact_match is not None:
        shares["exact answers"] = (then.exact_match.routed, today.exact_match.routed)
    rose = [Change(domain, name, a, b) for name, (a, b) in losses.items() if b > a * (1 + LOSS_TOLERANCE)]
    fell = [Change(domain, name, a, b) for name, (a, b) in shares.items() if a - b > _by_chance(a, b, then.rows)]
    return rose + fell


def _by_chance(before: float, now: float, rows: int) -> float:
    error = math.sqrt((before * (1 - before) + now * (1 - now)) / rows)
    return max(SHARE_TOLERANCE, 2 * error)


def _row(report: Report, name: str, domain: DomainReport) -> dict[str, object]:
    loss, exact = domain.loss, domain.exact_match
    return {
        "generation": report.generation,
        "split": report.split,
        "domain": name,
        "rows": domain.rows,
        "loss_base": loss.base,
        "loss_routed": loss.routed,
        "loss_oracle": loss.oracle,
        "loss_worst": loss.worst,
        "worst_adapter": loss.worst_adapter,
        "regret": loss.regret,
        "strange_regret": loss.strange_regret,
        "routed_right": domain.routed_right,
        "abstained": domain.abstained,
        "strange_abstained": domain.strange_abstained,
        "exact_base": None if exact is None else exact.base,
        "exact_routed": None if exact is None else exact.routed,
        "exact_oracle": None if exact is None else exact.oracle,
    }
