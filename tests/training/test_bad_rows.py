"""Bad rows: each is counted and named and nothing of it is learned; more than may be are an error before training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config.training import BadRowSettings, BaseSettings, Recipe, StageSettings
from cluster.errors import InvalidData
from cluster.lora.catalog import Catalog
from cluster.training import STAGES
from cluster.training.data import read_data
from tests.training.runs import FolderRun

NUM_ROWS = 400

BAD: dict[str, tuple[str, Any, str]] = {
    "null": ("prompt", None, "no prompt"),
    "no answer": ("response", " \n", "an empty response"),
    "over-long": ("prompt", "x" * 1001, "a prompt of 1,001 characters, more than 1,000"),
    "no UTF-8": ("response", b"\xff\xfe", "a response that is no UTF-8"),
    "no domain": ("domain", None, "no domain"),
}
LIMITS = BadRowSettings(share=0.01, at_least=2, max_characters=1000)


def write(folder: Path, spoilt: dict[int, tuple[str, Any]]) -> Path:
    columns: dict[str, list[Any]] = {
        "domain": ["law"] * NUM_ROWS,
        "prompt": [f"question {number}" for number in range(NUM_ROWS)],
        "response": [f"answer {number}" for number in range(NUM_ROWS)],
        "split": ["train"] * NUM_ROWS,
    }
    for index, (column, value) in spoilt.items():
        columns[column][index] = value
    # Written as text without looking, as a careless program would.
    raw = {
        name: [value.encode() if isinstance(value, str) else value for value in values]
        for name, values in columns.items()
    }
    arrays = {name: pa.array(values, pa.binary()).view(pa.string()) for name, values in raw.items()}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(arrays), folder / "part.parquet")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_left_out(tmp_path: Path, case: str) -> None:
    column, value, said = BAD[case]
    data = read_data(write(tmp_path / "data", {7: (column, value)}), LIMITS)
    assert data.left_out == f"left out 1 bad of 400 rows: row 7 of part.parquet has {said}"
    assert [row.prompt for row in data.rows("train")] == [f"question {n}" for n in range(NUM_ROWS) if n != 7]


@pytest.mark.parametrize(("num_bad", "limits"), [(4, LIMITS), (9, BadRowSettings(share=0.0, at_least=9))])
def test_as_many_as_may_be_are_left_out_and_one_more_is_an_error(
    tmp_path: Path, num_bad: int, limits: BadRowSettings
) -> None:
    spoilt = {3 * number: ("response", "") for number in range(num_bad)}
    data = read_data(write(tmp_path / "data", spoilt), limits)
    assert len(data.rows("train")) == NUM_ROWS - num_bad
    spoilt[399] = ("prompt", None)
    with pytest.raises(InvalidData) as caught:
        read_data(write(tmp_path / "data", spoilt), limits)
    assert f"{num_bad + 1} of 400 rows are bad, and at most {num_bad} may be: row 0 of part" in str(caught.value)
    assert ("more;" in str(caught.value)) == (num_bad + 1 > 5), "only the first few are named"


def test_a_stage_says_what_it_left_out_and_does_not_start_with_too_many(tmp_path: Path) -> None:
    recipe = Recipe(base=BaseSettings(size="nano", general_only=False, num_steps=1), bad_rows=LIMITS)

    def run_stage(spoilt: dict[int, tuple[str, Any]]) -> FolderRun:
        data = write(tmp_path / "data", spoilt)
        run = FolderRun(tmp_path / "run")
        STAGES["base"](StageSettings(root=tmp_path / "root", data=data, recipe=recipe, name="test"), run)
        return run

    with pytest.raises(InvalidData, match="at most 4 may be"):
        run_stage(dict.fromkeys(range(5), ("prompt", None)))
    assert Catalog(tmp_path / "root").latest() == 0
    said = run_stage({11: ("prompt", None)}).said
    assert said[0] == "left out 1 bad of 400 rows: row 11 of part.parquet has no prompt"


@pytest.mark.parametrize(
    "kind", [lambda a: a.dictionary_encode(), lambda a: a.cast(pa.large_string()), lambda a: a.cast(pa.binary())]
)
def test_texts_of_every_kind_are_read_alike(tmp_path: Path, kind: Callable[[pa.Array], pa.Array]) -> None:
    folder = write(tmp_path / "data", {})
    plain = read_data(folder)
    table = pq.read_table(folder / "part.parquet")
    pq.write_table(
        pa.table({name: kind(table[name].combine_chunks()) for name in table.column_names}), folder / "part.parquet"
    )
    assert read_data(folder) == plain
