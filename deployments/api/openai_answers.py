"""What OpenAI's clients get: an answer's chunks in the shapes of completions and chats, whole and streamed.

Knows nothing of connections, errors or routing.
"""

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.messages import FinishReason, TokenChunk, TokenLogprob
from deployments.api.openai_messages import ChatBody, CompletionBody

Json = Mapping[str, Any]


class Choice(ABC):
    """One of the answers to a prompt, growing."""

    def __init__(self, index: int, wants_logprobs: bool) -> None:
        self.num_tokens = 0
        self.prompt_tokens = 0
        self._index = index
        self._wants_logprobs = wants_logprobs
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish_reason: FinishReason | None = None
        self._has_begun = False

    def add(self, chunk: TokenChunk) -> Json | None:
        """Take the next chunk; return what a stream says of it, None for nothing."""
        self.num_tokens += len(chunk.token_ids)
        self.prompt_tokens = chunk.prompt_tokens
        self._texts.append(chunk.text)
        self._logprobs += chunk.logprobs
        self._finish_reason = chunk.finish_reason
        is_first, self._has_begun = not self._has_begun, True
        # Tokens whose bytes do not make a character yet have no text.
        if not (chunk.text or chunk.logprobs or chunk.finish_reason or is_first):
            return None
        return self._choice(self._delta(chunk.text, is_first), chunk.logprobs)

    def whole(self) -> Json:
        """All that was added. Its last chunk must have come."""
        return self._choice(self._content("".join(self._texts)), self._logprobs)

    def _choice(self, content: Json, logprobs: Sequence[TokenLogprob]) -> Json:
        return {
            "index": self._index,
            **content,
            "logprobs": self._report(logprobs) if self._wants_logprobs else None,
            "finish_reason": None if self._finish_reason is None else self._finish_reason.value,
        }

    @abstractmethod
    def _delta(self, text: str, is_first: bool) -> Json:
        """A piece of text in a stream."""

    @abstractmethod
    def _content(self, text: str) -> Json:
        """The whole text."""

    @abstractmethod
    def _report(self, logprobs: Sequence[TokenLogprob]) -> Json:
        """Log-probabilities of consecutive tokens."""


class _CompletionChoice(Choice):
    """A choice of /v1/completions."""

    def __init__(self, index: int, wants_logprobs: bool) -> None:
        super().__init__(index, wants_logprobs)
        self._offsets = _Offsets()

    def whole(self) -> Json:
        # The stream's offsets went on from chunk to chunk; those of the whole begin at its beginning.
        self._offsets = _Offsets()
        return super().whole()

    def _delta(self, text: str, is_first: bool) -> Json:
        return self._content(text)

    def _content(self, text: str) -> Json:
        return {"text": text}

    def _report(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {
            "tokens": [token.text for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [_by_text(token) for token in logprobs],
            "text_offset": [self._offsets.next(token) for token in logprobs],
        }


class _ChatChoice(Choice):
    """A choice of /v1/chat/completions."""

    def _delta(self, text: str, is_first: bool) -> Json:
        return {"delta": {"role": "assistant", "content": text} if is_first else {"content": text}}

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _report(self, logprobs: Sequence[TokenLogprob]) -> Json:
        content = [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in logprobs]
        return {"content": content, "refusal": None}


class Reply:
    """A whole answer or a stream's events: choices, and what stands around them."""

    def __init__(self, body: CompletionBody | ChatBody) -> None:
        is_chat = isinstance(body, ChatBody)
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._model = body.model
        self._whole_kind = "chat.completion" if is_chat else "text_completion"
        self._event_kind = "chat.completion.chunk" if is_chat else "text_completion"
        kind = _ChatChoice if is_chat else _CompletionChoice
        self._choices = [kind(index, body.wants_logprobs) for index in range(body.num_choices)]

    def add(self, index: int, chunk: TokenChunk) -> Json | None:
        """Take the next chunk of one choice; return the event that says it, None for nothing to say."""
        delta = self._choices[index].add(chunk)
        return None if delta is None else self._frame(self._event_kind, [delta])

    def whole(self) -> Json:
        """The answer, once the last chunk of each choice has come."""
        choices = [choice.whole() for choice in self._choices]
        return {**self._frame(self._whole_kind, choices), "usage": self._usage()}

    def usage_event(self) -> Json:
        """What ends a stream whose client wants token counts."""
        return {**self._frame(self._event_kind, []), "usage": self._usage()}

    def _frame(self, kind: str, choices: Sequence[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": int(time.time()),
            "model": self._model,
            "choices": choices,
        }

    def _usage(self) -> Json:
        """The prompt counts once, however many choices were made of it."""
        prompt_tokens = self._choices[0].prompt_tokens
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


class _Offsets:
    """Where the tokens of a text begin, in characters."""

    def __init__(self) -> None:
        # Holds the bytes of a character that a token has begun and the next may go on with.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0

    def next(self, token: TokenLogprob) -> int:
        """The offset of the next token: of the character that it begins with, or goes on with."""
        text_bytes = token.text_bytes or b""
        goes_on = 0x80 <= text_bytes[0] < 0xC0 if text_bytes else True
        if not goes_on:
            # Half a character that nothing completes is one replacement character.
            self._num_characters += len(self._decoder.decode(b"", final=True))
        offset = self._num_characters
        self._num_characters += len(self._decoder.decode(text_bytes))
        return offset


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the token itself; of two that read the same, the likelier."""
    logprobs: dict[str, float] = {}
    for other in (*token.top, token):
        logprobs.setdefault(other.text, other.logprob)
    return logprobs


def _token(token: TokenLogprob) -> Json:
    text_bytes = None if token.text_bytes is None else list(token.text_bytes)
    return {"token": token.text, "logprob": token.logprob, "bytes": text_bytes}
