"""Training data: tables in, batches of token ids out. Knows nothing of models or adapters.

A folder of Parquet files, or of data sets that Hugging Face's `datasets` saved, with columns `domain, prompt, response,
split`; others are ignored, except two. `prompt_bare` is the prompt without words that give its domain away: the router
learns from it too, and is measured on it; `topic` is the kind of prompt within its domain, which helps the router to
tell domains apart. A table without `split` says it by its name, as Hugging Face's do (`train-00000-of-00002.parquet`);
one that has `text` instead of prompt and response is for the base alone. Two names are no domains: rows of `none` are
prompts that no domain answers (the router learns to abstain on them, the base to answer them), rows of `base` are text
for the base alone.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cluster.config.training import BadRowSettings, StageSettings
from cluster.errors import InvalidData, InvalidInput
from cluster.messages import BASE_DOMAIN, NONE_DOMAIN, check_domain_name
from cluster.model.base import as_question, encode_answers, encode_prompts
from cluster.training.run import Run
from cluster.training.tables import RowReader, Table, tables

SPLITS = ("train", "val", "test")
_COLUMNS = ("domain", "prompt", "response", "split")
_OPTIONAL_COLUMNS = ("prompt_bare", "topic")

IGNORED_LABEL = -100
_LIMITS = BadRowSettings()


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and its answer."""

    domain: str
    prompt: str
    response: str
    bare_prompt: str
    """The prompt without words that give its domain away; the prompt itself where the data has no other."""
    topic: str = ""
    """Its kind within the domain; empty where the data names none."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """All rows of a folder, by split, but those for the base alone, of which there may be more than memory holds."""

    splits: dict[str, list[Row]]
    left_out: str = ""
    """A sentence on the rows that were bad and are not here; empty where all were good."""
    base_tables: tuple[Table, ...] = ()
    """Where rows for the base alone are. Tables of texts have not been looked at yet."""
    bad_rows: BadRowSettings = _LIMITS
    """How those are to be read."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The real domains, sorted."""
        named = {row.domain for rows in self.splits.values() for row in rows}
        return tuple(sorted(named - {NONE_DOMAIN}))

    def base_rows(self, split: str, say: Callable[[str], None] | None = None) -> Iterator[Row]:
        """The good rows for the base alone, read as they are asked for.

        Whoever reads them all learns through `say` which texts were left out, or gets `InvalidData` where more are bad
        than may be.
        """
        texts, others = RowReader(self.bad_rows), RowReader(self.bad_rows)
        for table in self.base_tables:
            columns = table.columns()
            if table.split not in (None, split) and "split" not in columns:
                continue
            for of_split, row in _rows(table, texts if _are_texts(columns) else others):
                if (of_split, row.domain) == (split, BASE_DOMAIN):
                    yield row
        texts.check()
        if say is not None and texts.left_out:
            say(texts.left_out)

    def rows(self, split: str, domain: str | None = None, limit: int | None = None) -> list[Row]:
        """Rows of a split in file order, of one domain if named, the first `limit` of them."""
        rows = self.splits.get(split, [])
        return [row for row in rows if domain is None or row.domain == domain][:limit]


def stage_data(settings: StageSettings, run: Run) -> DataSet:
    """The data of a stage, which says what was left out of them. Raises as `read_data`."""
    data = read_data(settings.data, settings.recipe.bad_rows)
    if data.left_out:
        run.say(data.left_out)
    return data


def read_data(folder: Path, bad_rows: BadRowSettings | None = None) -> DataSet:
    """Read every Parquet file below `folder`, without its bad rows; of tables of texts the columns alone.

    Raises `InvalidData` naming the file and what is wrong in it, or the bad rows where there are more than may be.
    """
    limits = bad_rows or BadRowSettings()
    reader = RowReader(limits)
    found = tables(folder)
    if not found:
        raise InvalidData(f"There is no Parquet file below {folder}; expected columns {', '.join(_COLUMNS)}.")
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    base_tables: dict[Table, None] = {}
    for table in found:
        if _are_texts(columns := table.columns()):
            table.check_has(_required(table, columns))
            base_tables[table] = None
            continue
        for split, row in _rows(table, reader):
            if row.domain == BASE_DOMAIN:
                base_tables[table] = None
            else:
                splits[split].append(row)
    reader.check()
    data = DataSet(splits, reader.left_out, tuple(base_tables), limits)
    if not any(splits.values()) and not base_tables:
        raise InvalidData(f"The Parquet files below {folder} hold no rows; expected at least one domain's.")
    for domain in data.domains:
        if not data.rows("train", domain):
            raise InvalidData(f"Domain {domain!r} has no rows with the split 'train'; add some or drop the domain.")
    return data


def _are_texts(columns: Sequence[str]) -> bool:
    """Whether a table is of texts for the base alone."""
    return "text" in columns and not {"prompt", "response"} & set(columns)


def _required(table: Table, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that it must have, given those that it has."""
    required = ("text",) if _are_texts(columns) else _COLUMNS[:-1]
    return (*required, "split") if table.split is None or "split" in columns else required


def _rows(table: Table, reader: RowReader) -> Iterator[tuple[str, Row]]:
    """The good rows, each with its split."""
    columns = table.columns()
    is_text = _are_texts(columns)
    for index, record in reader.records(table, _required(table, columns), () if is_text else _OPTIONAL_COLUMNS):
        split = record.get("split", table.split or "")
        check_split(split, index, table.path)
        if is_text:
            yield split, Row(BASE_DOMAIN, "", record["text"], "")
        else:
            _check_domain(record["domain"], index, table.path)
            yield split, row_of(record, record["domain"])


def row_of(record: dict[str, str], domain: str) -> Row:
    """A record of a file as a row."""
    bare = record.get("prompt_bare", record["prompt"])
    return Row(domain, record["prompt"], record["response"], bare, record.get("topic", ""))


def prompts_to_route(rows: Sequence[Row]) -> list[str]:
    """What the router learns from: of one row the prompt as it is sent, of the next the bare one, in turn.

    People send either. Not both of one row: of two that are nearly the same, one would vouch for the other where the
    router asks how rare a word is, or how well it knows a prompt that it has not seen.
    """
    return [row.bare_prompt if number % 2 else row.prompt for number, row in enumerate(rows)]


def check_split(split: str, index: int, file: Path) -> None:
    """Raise `InvalidData` for a split that there is not."""
    if split not in SPLITS:
        raise InvalidData(f"Row {index} of {file.name} has the split {split!r}; expected {', '.join(SPLITS)}.")


def data_digest(data: Path) -> str:
    """SHA-256 of every file of the tables below the folder `data`, names and bytes, or of the one file that it is:
    equal digests mean equal rows.
    """
    whole = hashlib.sha256()
    for file in itertools.chain.from_iterable(table.files for table in tables(data)):
        stat = file.stat()
        of_file = _file_digest(file, stat.st_size, stat.st_mtime_ns)
        name = file.relative_to(data) if file != data else Path(file.name)
        whole.update(f"{name} {of_file}\n".encode())
    return whole.hexdigest()


@cache
def _file_digest(file: Path, size: int, changed_ns: int) -> str:
    """Read once by a process, which asks more than once, unless it has changed."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_domain(domain: str, index: int, file: Path) -> None:
    if domain in (NONE_DOMAIN, BASE_DOMAIN):
        return
    try:
        check_domain_name(domain)
    except InvalidInput as error:
        raise InvalidData(f"Row {index} of {file.name} has a domain that cannot be: {error}") from error


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids: prompt, then response and end of sequence."""

    ids: tuple[int, ...]
    num_prompt_tokens: int
    num_response_bytes: int


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_tokens: int) -> list[Example]:
    """Rows as examples, cut at `max_tokens`: a long prompt loses its beginning, so that some response remains.

    Raises `InvalidInput` for a tokenizer that cannot say where a text ends.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InvalidInput("The base's tokenizer names no token that ends a text; set eos_token in its configuration.")
    # In front of a text without a prompt there must be something to predict from.
    first = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    asked = as_question(tokenizer)
    prompts = encode_prompts(tokenizer, [asked(row.prompt) for row in rows])
    # Special tokens written out in the data are text, as they are in what a user writes.
    responses = encode_answers(tokenizer, [row.response for row in rows])
    examples = []
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        prompt = prompt if row.prompt else [first]
        response = [*response, end]
        response = response[: max(max_tokens // 2, max_tokens - len(prompt))]
        overlong = len(prompt) + len(response) - max_tokens
        if overlong > 0:
            prompt = [prompt[0], *prompt[overlong + 1 :]]
        kept = str(tokenizer.decode(response, skip_special_tokens=True))
        examples.append(Example((*prompt, *response), len(prompt), len(kept.encode())))
    return examples


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of token ids. A row holds one example, or several one after the other that do not see each other."""

    ids_BT: Tensor
    labels_BT: Tensor
    """The token to predict at each position (already shifted), -100 where there is none."""
    positions_BT: Tensor
    """Positions within the example: each start from 0 begins a new one, and transformers masks attention by that."""

    @property
    def num_labels(self) -> int:
        return int((self.labels_BT != IGNORED_LABEL).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same there."""
        return Batch(self.ids_BT.to(device), self.labels_BT.to(device), self.positions_BT.to(device))


def collate(rows: Sequence[Sequence[Example]], pad_id: int, learn_prompts: bool) -> Batch:
    """One batch; each row holds its examples one after the other. Prompts are predicted too if `learn_prompts`.

    Padding is at the right, where no token of an example sees it.
    """
    width = max(sum(len(example.ids) - 1 for example in row) for row in rows)
    ids_BT = torch.full((len(rows), width), pad_id)
    labels_BT = torch.full((len(rows), width), IGNORED_LABEL)
    positions_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        start = 0
        for example in row:
            ids = torch.tensor(example.ids)
            end = start + len(ids) - 1
            ids_BT[index, start:end] = ids[:-1]
            first = 1 if learn_prompts else example.num_prompt_tokens
            labels_BT[index, start + first - 1 : end] = ids[first:]
            positions_BT[index, start:end] = torch.arange(end - start)
            start = end
        positions_BT[index, start:] = torch.arange(width - start)
    return Batch(ids_BT, labels_BT, positions_BT)


class BatchPlan:
    """Batches of packed rows, in an order that depends on the seed and the step alone, so that a run can resume.

    Each epoch visits every example once. Rows are as wide as the longest example, or 128 tokens if that is more.
    """

    def __init__(
        self, examples: Sequence[Example], tokens_per_batch: int, pad_id: int, learn_prompts: bool, seed: int
    ) -> None:
        if not examples:
            raise InvalidData("There is nothing to train on: the data holds no rows for this stage.")
        self._examples = examples
        self._lengths = [len(example.ids) for example in examples]
        self._width = max(128, max(self._lengths))
        self._rows_per_batch = max(1, tokens_per_batch // self._width)
        self._pad_id, self._learn_prompts, self._seed = pad_id, learn_prompts, seed
        self._epoch, self._first_step = -1, 0
        self._batches: list[list[list[int]]] = []

    def batch(self, step: int) -> Batch:
        """The batch of a step; going back to an earlier one begins at the first epoch again."""
        return collate(self.rows(step), self._pad_id, self._learn_prompts)

    def rows(self, step: int) -> list[list[Example]]:
        """The same as examples: those of each row."""
        if step < self._first_step:
            self._epoch, self._first_step, self._batches = -1, 0, []
        while step >= self._first_step + len(self._batches):
            self._first_step += len(self._batches)
            self._epoch += 1
            self._batches = self._plan_epoch(self._epoch)
        return [[self._examples[i] for i in row] for row in self._batches[step - self._first_step]]

    def _plan_epoch(self, epoch: int) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self._examples), generator=generator).tolist()
        rows: list[list[int]] = [[]]
        filled = 0
        for index in order:
            length = self._lengths[index] - 1
            if rows[-1] and filled + length > self._width:
                rows.append([])
                filled = 0
            rows[-1].append(index)
            filled += length
        return [rows[start : start + self._rows_per_batch] for start in range(0, len(rows), self._rows_per_batch)]
