"""Writes the starter's data as Parquet, the same for the same seed."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.messages import NONE_DOMAIN
from cluster.training.data import BASE_DOMAIN
from cluster.training.starter.domains import DOMAINS, Case
from cluster.training.starter.general import chat, exercise, note, refusal

TRAIN_ROWS_PER_DOMAIN = 1500
HELD_OUT_ROWS_PER_DOMAIN = 100
NONE_ROWS = {"train": 2500, "val": 200, "test": 200}
BASE_ROWS = ((exercise, 3000), (note, 7500), (refusal, 1000))
"""Kinds of rows for the base alone, and how many train rows of each."""


def generate_starter(folder: Path, seed: int = 0) -> None:
    """Write one Parquet file per domain, one for `none` and one for `base` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = {"val": HELD_OUT_ROWS_PER_DOMAIN, "test": HELD_OUT_ROWS_PER_DOMAIN}
    for name, domain in DOMAINS.items():
        counts = {"train": TRAIN_ROWS_PER_DOMAIN, **held_out}
        _write(folder, name, [r for split, n in counts.items() for r in _draw(seed, name, split, n, domain.case)])
    _write(folder, NONE_DOMAIN, [r for split, n in NONE_ROWS.items() for r in _draw(seed, "none", split, n, chat)])
    _write(folder, BASE_DOMAIN, [r for kind, n in BASE_ROWS for r in _draw(seed, kind.__name__, "train", n, _of(kind))])


def _of(kind: Callable[[Random], Case]) -> Callable[[Random, str], Case]:
    return lambda rng, split: kind(rng)


def _draw(
    seed: int, name: str, split: str, count: int, case: Callable[[Random, str], Case]
) -> list[tuple[str, str, str]]:
    # A string seeds Random through SHA-512: the same on every machine and in every process.
    rng = Random(f"{seed}:{name}:{split}")
    return [(split, *case(rng, split)) for _ in range(count)]


def _write(folder: Path, domain: str, rows: list[tuple[str, str, str]]) -> None:
    splits, prompts, responses = zip(*rows, strict=True)
    table = pa.table({"domain": [domain] * len(rows), "prompt": prompts, "response": responses, "split": splits})
    pq.write_table(table, folder / f"{domain}.parquet", compression="zstd")
