"""What the base reads: the same examples whether in memory or in a file, and every token of a long text once."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from cluster.config.training import BaseSettings, Recipe, StageSettings
from cluster.errors import InvalidData
from cluster.messages import BASE_DOMAIN
from cluster.training import STAGES
from cluster.training.corpus import StoredExamples, encode_corpus
from cluster.training.data import BatchPlan, Row, encode, read_data
from cluster.training.tables import tables
from tests.training.rows import COLUMNS, nano_tokenizer, some_examples, write_parquet
from tests.training.runs import FolderRun

TOKENIZER = nano_tokenizer()
SMALL = Recipe(base=BaseSettings(size="nano", num_steps=2, tokens_per_batch=256, max_tokens=64))
TEXTS = [f"text number {number} " + "of words " * number for number in range(60)]


def text_row(text: str) -> Row:
    return Row(BASE_DOMAIN, "", text, "")


def test_examples_in_a_file_are_those_in_memory_and_so_is_every_batch(tmp_path: Path) -> None:
    examples = some_examples(TOKENIZER, 50)
    stored = StoredExamples((tmp_path / "ids").open("w+b"), iter(examples))
    assert list(stored) == stored[:] == examples
    assert stored[-1] == examples[-1]
    with pytest.raises(IndexError):
        stored[50]
    plans = [BatchPlan(given, 256, 0, learn_prompts=True, seed=1) for given in (examples, stored)]
    for step in range(40):
        assert plans[0].rows(step) == plans[1].rows(step)
    assert len(StoredExamples((tmp_path / "none").open("w+b"), iter(()))) == 0


def test_rows_with_a_prompt_and_short_texts_are_encoded_as_ever() -> None:
    rows = [Row("law", "is this legal?", "yes", ""), text_row("good morning")]
    assert list(encode_corpus(TOKENIZER, rows, 64)) == encode(TOKENIZER, rows, 64)


@pytest.mark.parametrize("max_tokens", [16, 17, 64])
def test_every_token_of_a_long_text_is_predicted_once(max_tokens: int) -> None:
    for text in TEXTS:
        pieces = list(encode_corpus(TOKENIZER, [text_row(text)], max_tokens))
        whole = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        predicted = [token for piece in pieces for token in piece.ids[1:]]
        assert predicted == [*whole, TOKENIZER.eos_token_id]
        assert all(1 < len(piece.ids) <= max_tokens for piece in pieces)
        assert [piece.ids[0] for piece in pieces[1:]] == [piece.ids[-1] for piece in pieces[:-1]]
        assert sum(piece.num_response_bytes for piece in pieces) == len(text.encode())


def test_data_sets_that_datasets_saved_are_the_same_rows_as_their_parquet(tmp_path: Path) -> None:
    table = pa.table(COLUMNS)
    named = DatasetDict({"train": Dataset(table.slice(0, 3)), "validation": Dataset(table.slice(3))})
    named.remove_columns("split").save_to_disk(tmp_path / "saved")
    read = read_data(tmp_path / "saved")
    expected = pa.Table.from_pylist(
        [{**row, "split": "train" if at < 3 else "val"} for at, row in enumerate(table.to_pylist())]
    )
    (tmp_path / "written").mkdir()
    pq.write_table(expected, tmp_path / "written" / "rows.parquet")
    assert read.splits == read_data(tmp_path / "written").splits


def test_a_table_of_texts_is_for_the_base_alone_and_says_its_split_by_its_name(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    for name, texts in (("train-00000-of-00001", TEXTS[:40]), ("validation-00000-of-00001", TEXTS[40:])):
        pq.write_table(pa.table({"text": texts, "url": texts}), tmp_path / f"{name}.parquet")
    data = read_data(tmp_path)
    assert data.domains == ("law", "math")
    assert [row.response for row in data.base_rows("train")] == TEXTS[:40]
    assert [row.response for row in data.base_rows("val")] == TEXTS[40:]
    assert list(data.base_rows("test")) == []
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "more.parquet")
    with pytest.raises(InvalidData, match=r"more\.parquet lacks the column 'split'; it has text"):
        read_data(tmp_path)


def test_one_file_says_no_split_and_neither_does_what_is_around_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS}), folder / "train.parquet")
    pq.write_table(pa.table({"text": TEXTS}), folder / "more.parquet")
    assert [table.split for table in tables(folder)] == [None, "train"]
    assert [table.split for table in tables(folder / "train.parquet")] == [None]


def test_a_corpus_is_read_part_by_part(tmp_path: Path) -> None:
    """Of 40 MB of text less than a quarter is ever in Python's memory."""
    texts = ["word " * 400] * 20_000
    pq.write_table(pa.table({"text": texts}), tmp_path / "train.parquet")
    num_bytes = sum(map(len, texts))
    del texts
    tracemalloc.start()
    try:
        data = read_data(tmp_path)
        count = sum(1 for _ in data.base_rows("train"))
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert most_bytes < num_bytes / 4


def test_texts_are_looked_at_once_by_the_stage_that_learns_from_them(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.parquet"
    pq.write_table(pa.table({"text": [*TEXTS, " ", None]}), file)
    write_parquet(tmp_path / "data")
    said: list[str] = []
    data = read_data(tmp_path / "data")
    assert data.left_out == "", "other stages do not read them"
    assert [row.response for row in data.base_rows("train", said.append)] == TEXTS
    assert said == [
        "left out 2 bad of 62 rows: row 60 of train.parquet has an empty text; row 61 of train.parquet has no text"
    ]
    pq.write_table(pa.table({"text": TEXTS}), file)
    settings = StageSettings(root=tmp_path / "root", data=tmp_path / "data", recipe=SMALL, name="test")
    for split in ("train", "validation"):
        pq.write_table(pa.table({"text": [*TEXTS, *[None] * 6]}), file.with_stem(split))
        with pytest.raises(InvalidData, match=f"6 of 66 rows are bad, and at most 5 may be: row 60 of {split}"):
            STAGES["base"](settings, FolderRun(tmp_path / f"run {split}"))
        assert not (tmp_path / "root" / "base").exists(), "before anything is trained"
        pq.write_table(pa.table({"text": TEXTS}), file.with_stem(split))


def test_the_base_learns_from_texts_alone_and_leaves_no_tokens_behind(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "data" / "train")
    settings = StageSettings(root=tmp_path / "root", data=tmp_path / "data", recipe=SMALL, name="test")
    STAGES["base"](settings, FolderRun(tmp_path / "run"))
    assert (tmp_path / "root" / "base" / "1" / "model.safetensors").is_file()
    assert {file.name for file in (tmp_path / "root").iterdir()} == {"base", "catalog"}
