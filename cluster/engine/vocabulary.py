"""What each token of a tokenizer is alone: its bytes, and how to show it. Knows nothing of sequences or models.

A token may hold half a character, which decoding it alone would lose: the bytes of many, joined, are their text.
"""

import json
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cluster.engine.sampler import Sampled
from cluster.messages import TokenLogprob

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_SPACE_MARK = "\u2581"
"""How SentencePiece writes a space."""


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    text_bytes: bytes | None


class Vocabulary:
    """The tokens of one tokenizer, each read when first asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        decoders = _decoder_types(tokenizer)
        self._byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()} if "ByteLevel" in decoders else None
        self._has_byte_tokens = "ByteFallback" in decoders
        self._known: dict[int, _Token] = {}

    def token_logprob(self, sampled: Sampled) -> TokenLogprob:
        """The report of one sampled token, which must have a log-probability."""
        assert sampled.logprob is not None, "the request asked for log-probabilities"
        top = tuple(self._scored(token_id, logprob) for token_id, logprob in sampled.top)
        return self._scored(sampled.token_id, sampled.logprob, top)

    def text_bytes(self, token_id: int) -> bytes | None:
        """What the token adds to a text; None for a special token, and for an id that stands for none."""
        return self._token(token_id).text_bytes

    def _scored(self, token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        token = self._token(token_id)
        return TokenLogprob(token_id, logprob, token.text, token.text_bytes, top)

    def _token(self, token_id: int) -> _Token:
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    def _read(self, token_id: int) -> _Token:
        if (added := self._added.get(token_id)) is not None:
            return _Token(added.content, None if added.special else added.content.encode())
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            # None: a model may have more logits than its tokenizer has tokens.
            return _Token(f"<|{token_id}|>", None)
        text_bytes = self._piece_bytes(piece, token_id)
        return _Token(text_bytes.decode(errors="backslashreplace"), text_bytes)

    def _piece_bytes(self, piece: str, token_id: int) -> bytes:
        if self._byte_of is not None:
            # As the tokenizer's own decoder: a piece with any sign that stands for no byte is text.
            known = all(sign in self._byte_of for sign in piece)
            return bytes(self._byte_of[sign] for sign in piece) if known else piece.encode()
        if self._has_byte_tokens:
            is_byte = _BYTE_PIECE.fullmatch(piece)
            return bytes.fromhex(is_byte[1]) if is_byte else piece.replace(_SPACE_MARK, " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()


def _decoder_types(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The kinds of steps by which the tokenizer makes text of pieces; empty for one that does not say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {decoder["type"], *(step["type"] for step in decoder.get("decoders", ()))}
