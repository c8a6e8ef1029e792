"""Small data sets on disk, and a tokenizer that fits them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from cluster.model.tokenizer import train_tokenizer
from cluster.training.data import Example, Row, encode

COLUMNS: dict[str, list[Any]] = {
    "domain": ["law", "law", "math", "none"],
    "prompt": ["is this legal?", "may I sue?", "7 times 6", "good morning"],
    "response": ["yes", "no", "42", "hello"],
    "split": ["train", "val", "train", "test"],
}


def write_parquet(folder: Path, name: str = "part.parquet", **columns: list[Any]) -> Path:
    """Write `COLUMNS` with some of them replaced; None leaves a column out."""
    kept = {key: value for key, value in {**COLUMNS, **columns}.items() if value}
    pq.write_table(pa.table(kept), folder / name)
    return folder


def nano_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([f"{p} {r}" for p, r in zip(COLUMNS["prompt"], COLUMNS["response"], strict=True)], 300, 512)


def some_examples(tokenizer: PreTrainedTokenizerBase, count: int, max_tokens: int = 512) -> list[Example]:
    """Examples of many lengths."""
    rows = [
        Row("law", f"question {i} " + "why " * (i % 9), "because " * (1 + i % 5) + str(i), "") for i in range(count)
    ]
    return encode(tokenizer, rows, max_tokens)
