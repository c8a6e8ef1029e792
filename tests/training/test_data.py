"""Data in: what is wrong is named, long rows are cut as promised, every example is seen once per epoch."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.training import BadRowSettings
from cluster.errors import InvalidData
from cluster.model.base import encode_prompt
from cluster.router.examples import MAX_EXAMPLE_CHARACTERS, MAX_EXAMPLES
from cluster.training.data import IGNORED_LABEL, Batch, BatchPlan, Example, Row, collate, encode, read_data
from cluster.training.domain_data import examples_of
from cluster.training.stage_router import router_columns
from tests.training.rows import COLUMNS, nano_tokenizer, some_examples, write_parquet

TOKENIZER = nano_tokenizer()
PAD = TOKENIZER.pad_token_id
NONE_BAD = BadRowSettings(share=0.0, at_least=0)


def test_rows_come_in_by_split_and_domain_from_all_files(tmp_path: Path) -> None:
    write_parquet(tmp_path, extra=[1, 2, 3, 4])
    (tmp_path / "deep").mkdir()
    write_parquet(tmp_path / "deep", "more.parquet", prompt_bare=["a", "b", "c", "d"], domain=["sql"] * 4)
    data = read_data(tmp_path)
    assert data.domains == ("law", "math", "sql")
    assert data.rows("train", "sql") == [Row("sql", "is this legal?", "yes", "a"), Row("sql", "7 times 6", "42", "c")]
    assert data.rows("test", "none") == [Row("none", "good morning", "hello", "good morning")]
    assert len(data.rows("train")) == 4
    assert data.rows("train", limit=3) == data.rows("train")[:3]


def test_the_router_learns_from_prompts_as_they_are_sent_and_bare_in_turn() -> None:
    rows = [Row("law", f"sent {n}", "", f"bare {n}") for n in range(4)]
    assert router_columns(rows) == (["sent 0", "bare 1", "sent 2", "bare 3"], ["law"] * 4)


@pytest.mark.parametrize("num_rows", [3, 2 * MAX_EXAMPLES, 2 * MAX_EXAMPLES + 7])
def test_examples_of_a_domain_are_of_both_kinds_however_many_rows_there_are(num_rows: int) -> None:
    rows = [Row("law", f"sent {n}", "", f"bare {n}", f"topic {n}") for n in range(num_rows)]
    rows.append(Row("law", "long " * MAX_EXAMPLE_CHARACTERS, "", "bare", "topic"))
    examples = examples_of(rows)
    kinds = [text.partition(" ")[0] for text in examples.prompts]
    assert abs(kinds.count("sent") - kinds.count("bare")) <= 2
    assert num_rows / 3 < len(examples.prompts) <= min(num_rows + 1, MAX_EXAMPLES)
    numbers = [text.partition(" ")[2] for text in examples.prompts]
    assert all(topic == f"topic {number}".strip() for topic, number in zip(examples.topics or (), numbers, strict=True))


def test_a_column_topic_names_the_kind_of_each_row_and_may_be_absent(tmp_path: Path) -> None:
    write_parquet(tmp_path, topic=["contracts", "courts", "sums", "greetings"])
    assert [row.topic for split in ("train", "val", "test") for row in read_data(tmp_path).rows(split)] == [
        "contracts",
        "sums",
        "courts",
        "greetings",
    ]
    write_parquet(tmp_path)
    assert {row.topic for row in read_data(tmp_path).rows("train")} == {""}


WRONG: dict[str, tuple[dict[str, list[Any]], tuple[str, ...]]] = {
    "a missing column": ({"response": []}, ("part.parquet", "'response'", "domain, prompt, response, split")),
    "a null": ({"prompt": ["a", None, "b", "c"]}, ("row 1", "part.parquet", "prompt")),
    "an empty prompt_bare": ({"prompt_bare": ["a", "b", "c", None]}, ("row 3", "part.parquet", "prompt_bare")),
    "an unknown split": (
        {"split": ["train", "dev", "train", "test"]},
        ("Row 1", "part.parquet", "'dev'", "train, val"),
    ),
    "a name that is none": ({"domain": ["law", "law", "My Domain", "none"]}, ("Row 2", "part.parquet", "'My Domain'")),
    "a reserved name": ({"domain": ["law", "law", "zephyra", "none"]}, ("Row 2", "part.parquet", "'zephyra'")),
    "no name": ({"domain": ["law", "law", "", "none"]}, ("Row 2", "part.parquet", "''")),
    "nothing to train on": ({"split": ["train", "val", "val", "test"]}, ("'math'", "no rows with the split 'train'")),
    "lists for texts": ({"prompt": [["a"], ["b"], ["c"], ["d"]]}, ("part.parquet", "text columns")),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_named(tmp_path: Path, case: str) -> None:
    columns, named = WRONG[case]
    with pytest.raises(InvalidData) as caught:
        read_data(write_parquet(tmp_path, **columns), NONE_BAD)
    for part in named:
        assert part in str(caught.value)


def test_a_folder_without_rows_or_files_or_with_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"no Parquet file below .*nowhere; expected columns domain"):
        read_data(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in COLUMNS}), empty / "x.parquet")
    with pytest.raises(InvalidData, match=r"below .*empty hold no rows"):
        read_data(empty)
    table = pa.table({name: pa.array(values).cast(pa.binary()) for name, values in COLUMNS.items()})
    spoilt = pa.array([b"\xff\xfe", *table["prompt"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.schema.get_field_index("prompt"), "prompt", spoilt), empty / "x.parquet")
    with pytest.raises(InvalidData, match=r"row 0 of x\.parquet has a prompt that is no UTF-8"):
        read_data(empty, NONE_BAD)
    (empty / "x.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InvalidData, match=r"x\.parquet cannot be read as Parquet"):
        read_data(empty)


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.text("ab 12<|eos>", max_size=60).filter(str.strip),
    response=st.text("ab 12<|eos>", max_size=60),
    max_tokens=st.integers(16, 64),
)
def test_long_rows_are_cut_as_promised(prompt: str, response: str, max_tokens: int) -> None:
    (example,) = encode(TOKENIZER, [Row("law", prompt, response, prompt)], max_tokens)
    whole_prompt = encode_prompt(TOKENIZER, prompt)
    answer = TOKENIZER(response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    whole_response = [*answer, TOKENIZER.eos_token_id]
    got_prompt = list(example.ids[: example.num_prompt_tokens])
    got_response = list(example.ids[example.num_prompt_tokens :])
    assert len(example.ids) == min(max_tokens, len(whole_prompt) + len(whole_response))
    assert got_response == whole_response[: len(got_response)]
    assert len(got_response) >= min(len(whole_response), max_tokens // 2)
    assert got_prompt[0] == whole_prompt[0]
    assert got_prompt[1:] == whole_prompt[len(whole_prompt) - len(got_prompt) + 1 :]
    if got_response == whole_response:
        assert example.num_response_bytes == len(response.encode())


def _unpacked(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The examples of a batch, as (ids, labels), found again by their positions alone."""
    found = []
    for ids_T, labels_T, positions_T in zip(batch.ids_BT, batch.labels_BT, batch.positions_BT, strict=True):
        starts = [*(i for i, p in enumerate(positions_T.tolist()) if p == 0), len(ids_T)]
        for start, end in itertools.pairwise(starts):
            labels = tuple(labels_T[start:end].tolist())
            if any(label != IGNORED_LABEL for label in labels):
                found.append((tuple(ids_T[start:end].tolist()), labels))
    return found


@pytest.mark.parametrize("learn_prompts", [False, True])
def test_every_example_is_seen_once_per_epoch_and_predicted_where_it_should_be(learn_prompts: bool) -> None:
    examples = some_examples(TOKENIZER, 57)
    plan = BatchPlan(examples, tokens_per_batch=512, pad_id=PAD, learn_prompts=learn_prompts, seed=3)

    def expected(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
        hidden = 0 if learn_prompts else example.num_prompt_tokens - 1
        return example.ids[:-1], (IGNORED_LABEL,) * hidden + example.ids[1 + hidden :]

    every = sorted(expected(example) for example in examples)
    step, orders = 0, []
    for _ in range(3):
        seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        while len(seen) < len(examples):
            batch = plan.batch(step)
            assert batch.ids_BT.numel() <= 512
            assert batch.num_labels == sum(label != IGNORED_LABEL for _, labels in _unpacked(batch) for label in labels)
            seen += _unpacked(batch)
            step += 1
        assert sorted(seen) == every
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2], "each epoch has an order of its own"


def test_a_plan_made_anew_goes_on_where_the_old_one_was() -> None:
    examples = some_examples(TOKENIZER, 40)

    def plan(seed: int = 5) -> BatchPlan:
        return BatchPlan(examples, tokens_per_batch=256, pad_id=PAD, learn_prompts=False, seed=seed)

    running = plan()
    batches = [running.batch(step) for step in range(25)]
    for step in (0, 1, 9, 24):
        fresh = plan().batch(step)
        assert torch.equal(fresh.ids_BT, batches[step].ids_BT)
        assert torch.equal(fresh.labels_BT, batches[step].labels_BT)
        assert torch.equal(fresh.positions_BT, batches[step].positions_BT)
    assert not torch.equal(plan(seed=6).batch(0).ids_BT, batches[0].ids_BT)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(InvalidData, match="holds no rows for this stage"):
        BatchPlan([], tokens_per_batch=256, pad_id=PAD, learn_prompts=False, seed=0)


def test_padding_is_never_predicted() -> None:
    examples = some_examples(TOKENIZER, 5)
    batch = collate([[examples[0]], [examples[4]]], PAD, learn_prompts=True)
    assert batch.num_labels == len(examples[0].ids) + len(examples[4].ids) - 2
