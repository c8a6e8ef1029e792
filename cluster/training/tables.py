"""Rows of tables as texts: Parquet files, and data sets that Hugging Face's `datasets` saved. Read part by part, so
that a file may be larger than memory. A bad row is left out, counted and named; too many of them are an error.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config.training import BadRowSettings
from cluster.errors import InvalidData

if TYPE_CHECKING:
    from datasets import Dataset

_NAMED = 5
"""Bad rows that are told one by one."""
_ROWS_AT_ONCE = 1024

_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
"""What Hugging Face calls splits in the names of files and folders, and what they are called here."""


@dataclass(frozen=True, slots=True)
class Table:
    """A Parquet file, or the folder of one split that `datasets` saved (`Dataset.save_to_disk`)."""

    path: Path
    split: str | None = None
    """Of rows that name none; None where its name says nothing."""

    @property
    def files(self) -> list[Path]:
        """What it is kept in."""
        return [self.path] if self.path.is_file() else sorted(self.path.iterdir())

    def columns(self) -> tuple[str, ...]:
        """The names of its columns. Raises `InvalidData` where it cannot be read."""
        with self._readable():
            if self.path.is_file():
                return tuple(pq.ParquetFile(self.path).schema_arrow.names)
            return tuple(self._saved().column_names)

    def check_has(self, required: Sequence[str]) -> None:
        """Raise `InvalidData` unless it has these columns."""
        present = self.columns()
        if missing := [column for column in required if column not in present]:
            raise InvalidData(
                f"{self.path.name} lacks the column {missing[0]!r}; it has {', '.join(sorted(present))}, "
                f"expected {', '.join(required)}."
            )

    def parts(self, columns: Sequence[str]) -> Iterator[dict[str, list[str | bytes | None]]]:
        """Some rows of the columns at a time; no UTF-8 stays bytes. Raises `InvalidData` where there are no texts."""
        with self._readable():
            if self.path.is_file():
                batches = pq.ParquetFile(self.path).iter_batches(_ROWS_AT_ONCE, columns=list(columns))
            else:
                batches = self._saved().select_columns(list(columns)).with_format("arrow").iter(_ROWS_AT_ONCE)
            for batch in batches:
                yield {name: _texts(batch[name]) for name in columns}

    def _saved(self) -> "Dataset":
        # Here, since it takes a second to import and few need it.
        from datasets import Dataset

        return Dataset.load_from_disk(str(self.path))

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError) as error:
            kind = "Parquet" if self.path.is_file() else "a saved data set"
            raise InvalidData(f"{self.path.name} cannot be read as {kind} with text columns: {error}.") from error


def tables(data: Path) -> list[Table]:
    """The tables below a folder, by name, or the one file that is given."""
    if data.is_file():
        return [Table(data)]
    saved = [file.parent for file in data.rglob("state.json")]
    return [Table(path, _split(path.relative_to(data))) for path in sorted([*data.rglob("*.parquet"), *saved])]


def _split(path: Path) -> str | None:
    """By the name of a file or folder, or of the folder around it."""
    names = (name.partition("-")[0].partition(".")[0] for name in reversed(path.parts[-2:]))
    return next((_SPLITS[name] for name in names if name in _SPLITS), None)


class RowReader:
    """Reads one file after the other and remembers which rows it left out."""

    def __init__(self, limits: BadRowSettings) -> None:
        self._limits = limits
        self._num_rows = self._num_bad = 0
        self._named: list[str] = []

    def records(
        self, table: Table, required: Sequence[str], optional: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        """The good rows, each with its number in the table, from 0, and its columns: of `optional` those there are.

        Raises `InvalidData` for a table that lacks a column, or cannot be read.
        """
        table.check_has(required)
        columns = [*required, *(column for column in optional if column in table.columns())]
        rows = (values for part in table.parts(columns) for values in zip(*part.values(), strict=True))
        for index, values in enumerate(rows):
            self._num_rows += 1
            record: dict[str, str] = {}
            problem = None
            for name, value in zip(columns, values, strict=True):
                if problem := self._problem(name, value):
                    break
                assert isinstance(value, str)
                record[name] = value
            if problem is None:
                yield index, record
                continue
            self._num_bad += 1
            if len(self._named) < _NAMED:
                self._named.append(f"row {index} of {table.path.name} has {problem}")

    def check(self) -> None:
        """Raise `InvalidData` if more rows were bad than may be."""
        limit = max(self._limits.at_least, int(self._limits.share * self._num_rows))
        if self._num_bad > limit:
            raise InvalidData(
                f"{self._num_bad:,} of {self._num_rows:,} rows are bad, and at most {limit:,} may be: {self._told()}; "
                "mend or drop them."
            )

    @property
    def left_out(self) -> str:
        """A sentence on the bad rows; empty where there were none."""
        if not self._num_bad:
            return ""
        return f"left out {self._num_bad:,} bad of {self._num_rows:,} rows: {self._told()}"

    def _told(self) -> str:
        more = self._num_bad - len(self._named)
        return "; ".join(self._named) + (f"; and {more:,} more" if more else "")

    def _problem(self, name: str, value: str | bytes | None) -> str | None:
        if value is None:
            return f"no {name}"
        if isinstance(value, bytes):
            return f"a {name} that is no UTF-8"
        if name in ("response", "text") and not value.strip():
            return f"an empty {name}"
        if len(value) > self._limits.max_characters:
            return f"a {name} of {len(value):,} characters, more than {self._limits.max_characters:,}"
        return None


def _texts(column: pa.Array | pa.ChunkedArray) -> list[str | bytes | None]:
    """A column as texts; what is no UTF-8 stays bytes."""
    try:
        texts = column.cast(pa.string())
        # Else Python would find it, at the first row that is none.
        texts.validate(full=True)
        values: list[str | bytes | None] = texts.to_pylist()
        return values
    except pa.ArrowInvalid:
        return [_decoded(value) for value in column.cast(pa.binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
