"""What the base reads: rows as examples whose tokens lie in a file, since there may be more than memory holds."""

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from cluster.model.base import encode_answers
from cluster.training.data import Example, Row, encode

_ROWS_AT_ONCE = 1024


def encode_corpus(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], max_tokens: int) -> Iterator[Example]:
    """Rows as examples, as `encode` makes them; but a text without a prompt is not cut.

    It becomes as many examples as it needs, each of which begins with the last token of the one before: every token
    is predicted once.
    """
    remaining = iter(rows)
    while some := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
        examples = encode(tokenizer, some, max_tokens)
        for row, example in zip(some, examples, strict=True):
            if row.prompt or len(example.ids) < max_tokens:
                yield example
            else:
                yield from _pieces(tokenizer, example.ids[0], row.response, max_tokens)


def _pieces(tokenizer: PreTrainedTokenizerBase, first: int, text: str, max_tokens: int) -> Iterator[Example]:
    (answer,) = encode_answers(tokenizer, [text])
    ids = (first, *answer, tokenizer.eos_token_id)
    for start in range(0, len(ids) - 1, max_tokens - 1):
        piece = ids[start : start + max_tokens]
        kept = str(tokenizer.decode(list(piece[1:]), skip_special_tokens=True))
        yield Example(piece, 1, len(kept.encode()))


class StoredExamples(Sequence[Example]):
    """Examples in a file of token ids; in memory are three numbers of each."""

    def __init__(self, file: BinaryIO, examples: Iterable[Example]) -> None:
        """Writes `file`, empty and open for reading too, which nobody else may write to as long as this is used."""
        self._starts, self._prompts, self._bytes = array("q", [0]), array("i"), array("q")
        for example in examples:
            file.write(np.asarray(example.ids, dtype=np.int32).tobytes())
            self._starts.append(self._starts[-1] + len(example.ids))
            self._prompts.append(example.num_prompt_tokens)
            self._bytes.append(example.num_response_bytes)
        file.flush()
        # An empty file cannot be mapped.
        self._ids = np.memmap(file, dtype=np.int32, mode="r") if len(self) else np.empty(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        ids = self._ids[self._starts[place] : self._starts[place + 1]]
        return Example(tuple(ids.tolist()), self._prompts[place], self._bytes[place])
