"""Public data sets as texts and domains, from Parquet files. Knows nothing of routers.

The official test splits are not among the files: figures are taken on the official validation split, and what
calibrates is a part of train.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import InvalidData, InvalidInput

CALIBRATION_SHARE = 0.05
"""Of train. Some hundreds of texts are enough for a temperature and a threshold, and none of them teaches anything."""

_OUTSIDE_SPLIT = "oos_val"
_UNNAMABLE = re.compile(r"[^a-z0-9_-]")


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts, the domain of each, and what it is called more finely; the latter is the domain where nothing is finer."""

    texts: list[str]
    domains: list[str]
    intents: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def without_topics(self) -> "Texts":
        """The same, as if nothing were known beyond the domains."""
        return replace(self, intents=self.domains)

    @property
    def names_topics(self) -> bool:
        """Whether some domain has more than one intent."""
        return len(set(zip(self.domains, self.intents, strict=True))) > len(set(self.domains))

    def take(self, indices: Sequence[int]) -> "Texts":
        """Those rows, in that order."""
        columns = ([column[index] for index in indices] for column in (self.texts, self.domains, self.intents))
        return Texts(*columns)

    def where(self, holds: Callable[[str, str], bool]) -> "Texts":
        """The rows for whose domain and intent `holds` is true."""
        pairs = enumerate(zip(self.domains, self.intents, strict=True))
        return self.take([index for index, (domain, intent) in pairs if holds(domain, intent)])


@dataclass(frozen=True, slots=True)
class DataSet:
    """What is learned from, what is measured on, and validation texts that belong to no domain."""

    name: str
    train: Texts
    val: Texts
    outside: list[str]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set lies below the folder of all, and what its columns are called."""

    files: str
    """A pattern; all files that match are read."""
    text: str
    domain: str
    intent: str | None = None
    most_train_rows: int | None = None
    """Of each domain; drawn with a fixed seed."""


SOURCES = {
    "clinc": Source("clinc150/clinc150_full.parquet", "text", "domain", "intent"),
    "banking": Source("banking77/banking77_train.parquet", "text", "intent"),
    "hwu": Source("hwu64/hwu64.parquet", "text", "scenario", "intent"),
    "mmlu": Source("mmlu_routing/mmlu_routing.parquet", "question", "subject"),
    # Without the words of a template, which would give the domain away.
    "domains": Source("domains/*.parquet", "prompt_bare", "domain", most_train_rows=2000),
    "manytask": Source("manytask/manytask.parquet", "prompt", "task"),
}


def files_of(name: str, folder: Path) -> list[Path]:
    """The files of a data set that are there, in the order of their names."""
    return sorted(folder.glob(SOURCES[name].files))


def load(name: str, folder: Path, most_rows: int | None = None) -> DataSet:
    """The data set `name` of `SOURCES`, below `folder`; of each split at most `most_rows`, as many of each domain.

    Raises `InvalidInput` when it is not there and `InvalidData` when a file is not what is expected.
    """
    source = SOURCES[name]
    files = files_of(name, folder)
    if not files:
        raise InvalidInput(f"There is no {source.files} in {folder}; name the folder of the data with --data.")
    rows = [row for file in files for row in _read(file, source)]
    train, val = (_labelled(rows, split) for split in ("train", "val"))
    for split, texts in (("train", train), ("val", val)):
        if not len(texts):
            raise InvalidData(f"{source.files} has no rows of the split {split!r}; it needs some to learn and measure.")
    num_domains = len(set(train.domains))
    train = _at_most(train, source.most_train_rows)
    if most_rows is not None:
        train, val = (_at_most(texts, -(-most_rows // num_domains)) for texts in (train, val))
    outside = [text for text, _, _, split in rows if split == _OUTSIDE_SPLIT]
    return DataSet(name, train, val, outside[:most_rows])


def split_off_calibration(train: Texts, seed: int) -> tuple[Texts, Texts]:
    """What is left to learn from, and a twentieth of each intent to calibrate on; an intent of one row is learned."""
    rng = Random(seed)
    calibration: set[int] = set()
    for rows in _by(train.intents).values():
        share = min(len(rows) - 1, max(1, round(CALIBRATION_SHARE * len(rows))))
        calibration.update(rng.sample(rows, share))
    learned = [index for index in range(len(train)) if index not in calibration]
    return train.take(learned), train.take(sorted(calibration))


def few_of_each_intent(texts: Texts, num_examples: int, seed: int) -> Texts:
    """So many rows of each intent, drawn by `seed`, or all where there are fewer."""
    rng = Random(seed)
    groups = _by(texts.intents).values()
    return texts.take([index for rows in groups for index in rng.sample(rows, min(num_examples, len(rows)))])


def domain_name(label: str) -> str:
    """A label of a data set as the name of a domain: lower case, and `-` for what no name may hold."""
    return _UNNAMABLE.sub("-", label.lower())


def _read(file: Path, source: Source) -> list[tuple[str, str, str, str]]:
    """Text, domain, intent and split of each row."""
    wanted = (source.text, source.domain, source.intent or source.domain, "split")
    try:
        table = pq.read_table(file, columns=sorted(set(wanted)))
        if missing := sorted(set(wanted) - set(table.column_names)):
            raise InvalidData(
                f"{file.name} lacks the column {missing[0]!r}; expected {', '.join(sorted(set(wanted)))}."
            )
        columns = [table.column(name).cast(pa.string()).to_pylist() for name in wanted]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InvalidData(f"{file.name} cannot be read as Parquet with text columns: {error}.") from error
    if any(None in column for column in columns):
        raise InvalidData(f"{file.name} has rows without a value; expected text in {', '.join(sorted(set(wanted)))}.")
    return list(zip(*columns, strict=True))


def _labelled(rows: Sequence[tuple[str, str, str, str]], split: str) -> Texts:
    texts, labels, intents = [], [], []
    for text, label, intent, of_split in rows:
        if of_split == split:
            texts.append(text)
            labels.append(label)
            intents.append(intent)
    names = {label: domain_name(label) for label in labels}
    if len(set(names.values())) < len(names):
        raise InvalidData("Two labels of a data set become the same domain name; expected labels that differ in it.")
    return Texts(texts, [names[label] for label in labels], intents)


def _at_most(texts: Texts, most_rows: int | None) -> Texts:
    """At most so many rows of each domain, drawn with a fixed seed."""
    if most_rows is None:
        return texts
    rng = Random(0)
    groups = _by(texts.domains).values()
    kept = [rng.sample(rows, most_rows) if len(rows) > most_rows else rows for rows in groups]
    return texts.take(sorted(index for rows in kept for index in rows))


def _by(labels: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each label, labels in the order in which they first occur."""
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return groups
