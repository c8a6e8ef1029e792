"""Rows of Parquet files as texts. A bad row is left out, counted and named; too many of them are an error."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import BadRowSettings
from cluster.errors import InvalidData

_NAMED = 5
"""Bad rows that are told one by one."""


def parquet_files(data: Path) -> list[Path]:
    """The Parquet files below a folder, by name, or the one file that is given."""
    return [data] if data.is_file() else sorted(data.rglob("*.parquet"))


class RowReader:
    """Reads one file after the other and remembers which rows it left out."""

    def __init__(self, limits: BadRowSettings) -> None:
        self._limits = limits
        self._num_rows = self._num_bad = 0
        self._named: list[str] = []

    def records(
        self, file: Path, required: Sequence[str], optional: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        """The good rows, each with its number in the file, from 0, and its columns: of `optional` those that are there.

        Raises `InvalidData` for a file that lacks a column, or cannot be read.
        """
        columns = _read_columns(file, required, optional)
        for index, values in enumerate(zip(*columns.values(), strict=True)):
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
                self._named.append(f"row {index} of {file.name} has {problem}")

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
        if name == "response" and not value.strip():
            return "an empty response"
        if len(value) > self._limits.max_characters:
            return f"a {name} of {len(value):,} characters, more than {self._limits.max_characters:,}"
        return None


def _read_columns(file: Path, required: Sequence[str], optional: Sequence[str]) -> dict[str, list[str | bytes | None]]:
    try:
        parquet = pq.ParquetFile(file)
        present = set(parquet.schema_arrow.names)
        if missing := [column for column in required if column not in present]:
            raise InvalidData(
                f"{file.name} lacks the column {missing[0]!r}; it has {', '.join(sorted(present))}, "
                f"expected {', '.join(required)}."
            )
        wanted = [*required, *(column for column in optional if column in present)]
        table = parquet.read(columns=wanted)
        return {name: _texts(table[name]) for name in wanted}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InvalidData(f"{file.name} cannot be read as Parquet with text columns: {error}.") from error


def _texts(column: pa.ChunkedArray) -> list[str | bytes | None]:
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
