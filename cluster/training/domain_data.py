"""The rows of one domain that is added to a trained system: what to learn, and what is held out to measure.

Parquet, or a saved data set, with the columns `prompt, response`, and those that training data may have besides. Where
there is a column `domain`, its other domains are left aside; where no row is of another split than `train`, some are
held out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.training import BadRowSettings
from cluster.errors import InvalidData
from cluster.router.examples import MAX_EXAMPLE_CHARACTERS, MAX_EXAMPLES, MAX_EXAMPLES_BYTES, Examples
from cluster.training.data import Row, check_split, row_of
from cluster.training.tables import RowReader, tables

_COLUMNS = ("prompt", "response")
_OPTIONAL_COLUMNS = ("domain", "split", "prompt_bare", "topic")


@dataclass(frozen=True, slots=True)
class DomainData:
    """One domain's rows."""

    train: list[Row]
    held_out: list[Row]
    told: tuple[str, ...]
    """Sentences on bad rows that were left out, and on what was held out."""


def read_domain(data: Path, domain: str, bad_rows: BadRowSettings, held_out_share: float) -> DomainData:
    """Read the rows of `domain` from a folder of tables, or from one Parquet file.

    Held out are the rows of the split `val`, else of `test`, else so large a share of the prompts, always the same.
    Raises `InvalidData` for a file that cannot be read, too many bad rows, or too few rows to learn and to measure.
    """
    reader = RowReader(bad_rows)
    found = tables(data)
    if not found:
        raise InvalidData(f"There is no Parquet file in {data}; expected columns {', '.join(_COLUMNS)}.")
    splits: dict[str, list[Row]] = {}
    others: set[str] = set()
    for table in found:
        for index, record in reader.records(table, _COLUMNS, _OPTIONAL_COLUMNS):
            if (named := record.get("domain", domain)) != domain:
                others.add(named)
                continue
            split = record.get("split", table.split or "train")
            check_split(split, index, table.path)
            splits.setdefault(split, []).append(row_of(record, domain))
    reader.check()
    told: tuple[str, ...] = (reader.left_out,) if reader.left_out else ()
    train, held_out = splits.get("train", []), splits.get("val") or splits.get("test") or []
    if train and not held_out:
        train, held_out = _hold_out(train, held_out_share)
        told += (f"held out {len(held_out):,} of {len(train) + len(held_out):,} rows to measure on",)
    if not train or not held_out:
        there = f"{len(train):,} rows to learn from and {len(held_out):,} to measure on"
        elsewhere = f" (its domains are {', '.join(sorted(others)[:20])})" if others else ""
        raise InvalidData(f"{data} has {there} of {domain!r}{elsewhere}; expected some of both, of different prompts.")
    return DomainData(train, held_out, told)


def examples_of(rows: Sequence[Row]) -> Examples:
    """The prompts that the router learns the domain from: of many, evenly spread ones. Empty if no row has one."""
    # As `prompts_to_route`, but of what is short enough to be an example.
    prompts = [(tuple(filter(_fits, (row.prompt, row.bare_prompt))), row.topic) for row in rows]
    fitting = [(either, topic) for either, topic in prompts if either]
    spacing = max(1, -(-len(fitting) // MAX_EXAMPLES))
    while True:
        chosen = fitting[::spacing]
        texts = tuple(either[number % len(either)] for number, (either, _) in enumerate(chosen))
        topics = tuple(topic for _, topic in chosen)
        examples = Examples(texts, topics if all(topics) and topics else None)
        if len(examples.to_bytes()) <= MAX_EXAMPLES_BYTES:
            return examples
        spacing *= 2


def _fits(prompt: str) -> bool:
    return bool(prompt.strip()) and len(prompt) <= MAX_EXAMPLE_CHARACTERS


def _hold_out(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """The rows but for a share of their prompts, and those. Equal prompts stay together."""
    prompts = sorted({row.prompt for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())
    held = set(prompts[: max(1, round(share * len(prompts)))])
    return [row for row in rows if row.prompt not in held], [row for row in rows if row.prompt in held]
