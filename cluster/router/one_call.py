"""Texts -> calibrated logits in one native call, for serving: what `Encoder` and `Head` say, to rounding.

In torch it is some sixty small operations, of which each costs more than what it computes, and each lets go of Python's
lock, which among the threads of a server is waited for again. Letters: B texts, D domains, N features.
"""

import ctypes
import itertools
import struct
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cluster.kernels import library as native
from cluster.router.encoder import NOVEL_WIDTH, Encoder
from cluster.router.features import packed
from cluster.router.head import SHARPNESS, Head
from cluster.router.naive_bayes import NaiveBayes
from cluster.router.scoring import ONE
from cluster.router.word_vectors import GAIN

_MOST_PRODUCTS_LOCKED = 4096
"""Texts times prototypes up to which Python's lock is held: a tenth of a millisecond. To let go of it and take it again
among the threads of a server takes longer, now and then by milliseconds."""


class OneCall:
    """An encoder and a head as the native call reads them: where their numbers lie."""

    def __init__(self, library: ctypes.CDLL, encoder: Encoder, head: Head) -> None:
        self._call = library.zephyra_text_logits
        self._locked_call = ctypes.PYFUNCTYPE(None, *self._call.argtypes)(
            ctypes.cast(self._call, ctypes.c_void_p).value or 0
        )
        self._made_of = _parts(encoder, head)
        self._encoder = _encoder(encoder)
        prototypes = head.fixed_prototypes()
        self._num_domains, self._num_prototypes = len(prototypes.starts) - 1, len(prototypes.rows_RV)
        self._head = native.RouterHead(
            _feed_forward(head.none_in, head.none_out),
            head.none_offset.data_ptr(),
            head.offsets_D.data_ptr(),
            head.temperature.data_ptr(),
            native.Prototypes(
                prototypes.rows_RV.data_ptr(),
                prototypes.starts.data_ptr(),
                self._num_domains,
                encoder.width + NOVEL_WIDTH,
            ),
            SHARPNESS / ONE**2,
        )

    @classmethod
    def of(cls, encoder: Encoder, head: Head) -> Self | None:
        """None where there is no compiler."""
        library = native.native_library()
        return None if library is None else cls(library, encoder, head)

    def is_of(self, encoder: Encoder, head: Head) -> bool:
        """Whether it reads the numbers of these two as they are now. What is written to them it sees; what is replaced,
        it does not.
        """
        return all(now is then for now, then in zip(_parts(encoder, head), self._made_of, strict=True))

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[B, D + 1], none last. A text's do not depend, in any bit, on the texts beside it."""
        slots, kinds, sizes = zip(*map(packed, texts), strict=True)
        kept = (b"".join(slots), b"".join(kinds), struct.pack(f"{len(texts) + 1}q", 0, *itertools.accumulate(sizes)))
        given = native.Texts(*(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p) for data in kept), len(texts))
        found_BC = np.empty((len(texts), self._num_domains + 1), dtype=np.float32)
        is_short = len(texts) * self._num_prototypes <= _MOST_PRODUCTS_LOCKED
        (self._locked_call if is_short else self._call)(self._encoder, self._head, given, found_BC.ctypes.data)
        return found_BC


def _parts(encoder: Encoder, head: Head) -> tuple[object, ...]:
    """What is another object once a number lies elsewhere: moving a module replaces its buffers."""
    return encoder, encoder.words, encoder.votes, head, head.offsets_D, head.fixed_prototypes()


def _encoder(encoder: Encoder) -> native.TextEncoder:
    lexicon, words = encoder.lexicon, encoder.words
    return native.TextEncoder(
        lexicon.rows.data_ptr(),
        lexicon.rarities.data_ptr(),
        encoder.table.weight.data_ptr(),
        _feed_forward(encoder.up, encoder.down),
        None if words is None else words.numbers.data_ptr(),
        None if words is None else words.vectors_YQ.data_ptr(),
        native.FeedForward() if words is None else _feed_forward(words.up, words.down),
        GAIN,
        0.0,
        encoder.novel_table.data_ptr(),
        encoder.novel_shares_K.data_ptr(),
        native.Votes() if encoder.votes is None else _votes(encoder.votes),
        len(lexicon.row_slots),
        encoder.width,
        *encoder.novel_table.shape,
    )


def _votes(votes: NaiveBayes) -> native.Votes:
    parts = (votes.numbers, votes.starts, votes.domains_M, votes.weights_M, votes.domains_DW)
    return native.Votes(
        *(part.data_ptr() for part in parts), _feed_forward(votes.up, votes.down), len(votes.domains_DW)
    )


def _feed_forward(first: nn.Linear, second: nn.Linear) -> native.FeedForward:
    weights = (first.weight, first.bias, second.weight, second.bias)
    return native.FeedForward(
        *(part.data_ptr() for part in weights), first.in_features, first.out_features, second.out_features
    )
