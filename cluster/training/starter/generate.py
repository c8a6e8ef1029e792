"""Writes the starter's data as Parquet, the same for the same seed."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.messages import BASE_DOMAIN, NONE_DOMAIN
from cluster.training.starter.domains import DOMAINS, Case, FactDomain
from cluster.training.starter.general import chat, exercise, invented_word, note, refusal

TRAIN_ROWS_PER_DOMAIN = 2000
HELD_OUT_ROWS_PER_DOMAIN = 100
NONE_ROWS = {"train": 2500, "val": 200, "test": 200}
BASE_ROWS = ((exercise, 5000), (note, 5000), (refusal, 1000))
"""Kinds of rows for the base alone, and how many train rows of each."""
DISTURBED_SHARE = 0.3

Row = tuple[str, str, str, str]
"""Split, prompt, response, and the prompt as the router reads it."""


def generate_starter(folder: Path, seed: int = 0) -> None:
    """Write one Parquet file per domain, one for `none` and one for `base` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = {"val": HELD_OUT_ROWS_PER_DOMAIN, "test": HELD_OUT_ROWS_PER_DOMAIN}
    for name, domain in DOMAINS.items():
        counts = {"train": TRAIN_ROWS_PER_DOMAIN, **held_out}
        rows = [row for split, count in counts.items() for row in _draw(seed, name, split, count, domain.case)]
        if isinstance(domain, FactDomain):  # in a skill's prompt every word may have to be copied
            rows = _disturbed(rows, Random(f"{seed}:{name}"))
        _write(folder, name, rows)
    _write(folder, NONE_DOMAIN, [r for split, n in NONE_ROWS.items() for r in _draw(seed, "none", split, n, chat)])
    _write(folder, BASE_DOMAIN, [r for kind, n in BASE_ROWS for r in _draw(seed, kind.__name__, "train", n, _of(kind))])


def _disturbed(rows: list[Row], rng: Random) -> list[Row]:
    """An invented word somewhere in some of the train prompts: an adapter must not stumble over words it never saw.

    The bare prompt is the one without it, since to the router strange words do mean something: of half of these rows it
    learns from that one.
    """
    out = []
    for split, prompt, response, bare in rows:
        if split == "train" and rng.random() < DISTURBED_SHARE:
            words = prompt.split(" ")
            words.insert(rng.randint(1, len(words)), invented_word(rng))
            prompt = " ".join(words)
        out.append((split, prompt, response, bare))
    return out


def _of(kind: Callable[[Random], Case]) -> Callable[[Random, str], Case]:
    return lambda rng, split: kind(rng)


def _draw(seed: int, name: str, split: str, count: int, case: Callable[[Random, str], Case]) -> list[Row]:
    # A string seeds Random through SHA-512: the same on every machine and in every process.
    rng = Random(f"{seed}:{name}:{split}")
    cases = [case(rng, split) for _ in range(count)]
    return [(split, prompt, response, prompt) for prompt, response in cases]


def _write(folder: Path, domain: str, rows: list[Row]) -> None:
    splits, prompts, responses, bare = zip(*rows, strict=True)
    columns = {"prompt": prompts, "prompt_bare": bare, "response": responses, "split": splits}
    table = pa.table({"domain": [domain] * len(rows), **columns})
    pq.write_table(table, folder / f"{domain}.parquet", compression="zstd")
