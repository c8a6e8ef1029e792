"""Token ids to text, as they come: no half characters, no text that a stop string may yet take back.

The texts given out, joined, are the decoding of all ids at once, cut before the first stop string to be completed.
Special tokens are no text. Knows nothing of sequences or models.
"""

from collections.abc import Sequence as Tokens

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
"""What bytes decode to that are no character, or not yet."""


class Detokenizer:
    """The text of one growing sequence. `push` ids until `stopped` or the sequence's end, then `finish`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        """A stop string was completed: all that comes after is no text."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._context_start = 0
        """Ids from here to `_unread_start` are decoded again, since the text of an id can depend on the one before."""
        self._unread_start = 0
        self._held = ""
        """Complete text that may be the beginning of a stop string."""

    def push(self, token_ids: Tokens[int]) -> str:
        """Take more ids; return the text that is now certain, which may be empty."""
        if self.stopped:
            return ""
        self._ids += token_ids
        text = self._unread_text()
        # Several replacement characters at the end can still become one character.
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context_start, self._unread_start = self._unread_start, len(self._ids)
        return self._release(text)

    def finish(self) -> str:
        """The end of the sequence: all text that was held back, half characters as replacement characters."""
        if self.stopped:
            return ""
        text = self._release(self._unread_text())
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _unread_text(self) -> str:
        before = self._decode(self._ids[self._context_start : self._unread_start])
        return self._decode(self._ids[self._context_start :])[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _release(self, text: str) -> str:
        """Add `text` to what is held; return what no stop string can reach any more."""
        text = self._held + text
        # The stop string that is completed first ends the text, whatever the pieces it comes in; of two that end
        # together, the longer. Nothing given out before can belong to it, or it would still be held.
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        held = self._stop_prefix_length(text)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]

    def _stop_prefix_length(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0) - 1
        for length in range(min(len(text), longest), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
