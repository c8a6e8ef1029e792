"""Text -> hashed features: words, pairs of neighbouring words, and runs of 3 to 5 characters inside each word.

Knows nothing of domains or of what was seen in training. Any string is accepted and costs bounded time: only the
first and last characters of a long text are read. Letters: N features, B texts, S width of a sentence's vector.
"""

import functools
import itertools
import re
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_SLOTS = 2**21
"""Features are hashed to this many slots."""

WORD, PAIR, CHARACTERS = 0, 1, 2
"""The kinds of feature."""
NUM_KINDS = 3

HEAD_CHARACTERS, TAIL_CHARACTERS = 512, 256
"""What is read of a long text: a prompt states its task first, sometimes last, and carries material between."""

_MAX_WORD_CHARACTERS = 40
_WORD_CACHE = 32_768
TOKEN = re.compile(r"\w+|[^\w\s]")
_DIGIT = re.compile(r"\d")
_PAIR_FACTOR, _MASK = 0x9E3779B1, 0xFFFFFFFF
_EDGE = zlib.crc32(b"the edge of the text")
_PAIR_BYTES = struct.pack("q", PAIR)


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """The features of one text."""

    slots_N: NDArray[np.int64]
    kinds_N: NDArray[np.int64]
    words_N: NDArray[np.int64]
    """Which word of the text a feature belongs to (a pair to its second), so that a word can be dropped whole."""
    num_words: int
    sentence_S: NDArray[np.float32] | None = None
    """What a pretrained sentence encoder makes of the text, where the router has one."""


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """The features of several texts, one after another."""

    slots_N: Tensor
    kinds_N: Tensor
    texts_N: Tensor
    """Which text of the batch a feature belongs to."""
    words_N: Tensor
    """Which word of the whole batch a feature belongs to."""
    num_texts: int
    num_words: int
    sentences_BS: Tensor | None = None
    """A row per text, where all of them come with one."""


def window(text: str) -> str:
    """What is read of `text`."""
    if len(text) <= HEAD_CHARACTERS + TAIL_CHARACTERS:
        return text
    return f"{text[:HEAD_CHARACTERS]} {text[-TAIL_CHARACTERS:]}"


def normalise(text: str) -> str:
    """The window of `text` that is read, in compatibility form (NFKC) and lower case, each digit written 0.

    That a number has four digits says something of the domain; which four does not.
    """
    text = window(text)
    if not text.isascii():
        # One character can become eighteen.
        text = unicodedata.normalize("NFKC", text)[: 2 * (HEAD_CHARACTERS + TAIL_CHARACTERS)]
    return _DIGIT.sub("0", text.lower())


@dataclass(frozen=True, slots=True)
class _Word:
    slots: NDArray[np.int64]
    """The word itself first, then its runs of characters."""
    kinds: NDArray[np.int64]
    hash: int


@functools.lru_cache(maxsize=_WORD_CACHE)
def _word(word: str) -> _Word:
    data = word.encode("utf-8", "surrogatepass")
    bounded = f"<{word[:_MAX_WORD_CHARACTERS]}>"
    runs = {bounded[i : i + n] for n in (3, 4, 5) for i in range(len(bounded) - n + 1)}
    hashes = [zlib.crc32(b"w" + data)]
    hashes += sorted(zlib.crc32(b"c" + run.encode("utf-8", "surrogatepass")) for run in runs)
    slots = np.array(hashes, dtype=np.int64) % NUM_SLOTS
    kinds = np.full(len(slots), CHARACTERS, dtype=np.int64)
    kinds[0] = WORD
    return _Word(slots, kinds, hashes[0])


def extract(text: str) -> TextFeatures:
    """The features of `text`; of a text without words, the one pair of its two edges."""
    words = _words(text)
    pair_slots = np.array(_pair_slots(words), dtype=np.int64)
    num_words = len(words) + 1
    numbers = np.arange(num_words)
    sizes = np.array([len(word.slots) for word in words], dtype=np.int64)
    return TextFeatures(
        np.concatenate([*(word.slots for word in words), pair_slots]),
        np.concatenate([*(word.kinds for word in words), np.full(num_words, PAIR)]),
        np.concatenate([np.repeat(numbers[:-1], sizes), numbers]),
        num_words,
    )


def packed(text: str) -> tuple[bytes, bytes, int]:
    """The slots and the kinds that `extract` gives, as int64 one after another, and how many: for a native call."""
    words = _words(text)
    pairs = _pair_slots(words)
    slots = b"".join([*(word.slots.data for word in words), struct.pack(f"{len(pairs)}q", *pairs)])
    kinds = b"".join([*(word.kinds.data for word in words), _PAIR_BYTES * len(pairs)])
    return slots, kinds, len(slots) // 8


def _words(text: str) -> list[_Word]:
    return [_word(word) for word in TOKEN.findall(normalise(text))]


def _pair_slots(words: Sequence[_Word]) -> list[int]:
    hashes = [_EDGE, *(word.hash for word in words), _EDGE]
    # Products in 32 bits, which is what mixes the two hashes; the upper bits are the mixed ones.
    return [
        ((((first * _PAIR_FACTOR) & _MASK) ^ second) * _PAIR_FACTOR & _MASK) >> 11 & (NUM_SLOTS - 1)
        for first, second in itertools.pairwise(hashes)
    ]


def collate(texts: Sequence[TextFeatures]) -> FeatureBatch:
    """Several texts as one batch."""
    sizes = np.array([len(text.slots_N) for text in texts], dtype=np.int64)
    num_words = np.array([text.num_words for text in texts], dtype=np.int64)
    first_word = np.repeat(np.cumsum(num_words) - num_words, sizes)

    def joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)

    sentences = [text.sentence_S for text in texts if text.sentence_S is not None]

    return FeatureBatch(
        torch.from_numpy(joined([text.slots_N for text in texts])),
        torch.from_numpy(joined([text.kinds_N for text in texts])),
        torch.from_numpy(np.repeat(np.arange(len(texts)), sizes)),
        torch.from_numpy(joined([text.words_N for text in texts]) + first_word),
        len(texts),
        int(num_words.sum()),
        torch.from_numpy(np.stack(sentences)) if texts and len(sentences) == len(texts) else None,
    )
