"""What OpenAI's clients send, as pydantic models, and its translation to a `ClientRequest`.

Unknown fields are refused: a misspelt one would otherwise be ignored without a word.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cluster.errors import InvalidInput
from cluster.messages import ChatMessage, ClientRequest, Prompt, Role, SamplingParams

_MAX_QUOTED_CHARACTERS = 80


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = False
    """Send one more event, with the token counts, before the end."""


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class _Generation(_Body):
    """What completions and chats have in common."""

    model: str = "zephyra"
    """`zephyra` (the router decides), `zephyra:<domain>`, or `base`."""
    mixture: dict[str, float] | None = None
    """Ours: weights by `domain` or `domain@version`. Overrides `model`; empty for the plain base."""
    max_tokens: int | None = None
    temperature: float | None = None
    """0, the default, takes the likeliest token."""
    top_p: float | None = None
    top_k: int | None = None
    """Ours: draw from the k likeliest tokens; 0, the default, for all."""
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    """One answer per request."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted because clients send it; nothing depends on it."""

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def client_request(self, prompt: Prompt, max_tokens: int | None) -> ClientRequest:
        """This request in our own words. Raises `InvalidInput` for a value out of its range."""
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options is given, stream is false; leave it out or set stream to true.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given = {
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        chosen: Any = {name: value for name, value in given.items() if value is not None}
        sampling = SamplingParams(seed=self.seed, stop=stop, **chosen)
        return ClientRequest(prompt, self.model, self.mixture, sampling)


class CompletionBody(_Generation):
    """The body of POST /v1/completions."""

    prompt: str

    def translate(self) -> ClientRequest:
        """As a `ClientRequest`. Raises `InvalidInput`."""
        return self.client_request(self.prompt, self.max_tokens)


class ChatBody(_Generation):
    """The body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    """OpenAI's newer name for max_tokens."""

    def translate(self) -> ClientRequest:
        """As a `ClientRequest`. Raises `InvalidInput`."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidInput(f"max_tokens is {old} and max_completion_tokens is {new}; give one of them.")
        return self.client_request(chat(self.messages), new if new is not None else old)


class RouteBody(_Body):
    """The body of POST /v1/route: a prompt or messages."""

    prompt: str | None = None
    messages: list[Message] | None = None

    def translate(self) -> Prompt:
        """The prompt. Raises `InvalidInput` unless exactly one of the two is given."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidInput("Expected either prompt or messages; give exactly one of them.")
        return self.prompt if self.prompt is not None else chat(self.messages or [])


def chat(messages: Sequence[Message]) -> Prompt:
    """A chat's turns in our own words."""
    return tuple(ChatMessage(Role(message.role), message.content) for message in messages)


def sentence(problem: Mapping[str, Any], fields: Sequence[str]) -> str:
    """One of pydantic's complaints about a body, as a sentence for the client. `fields` are those the body may have."""
    path = [str(part) for part in problem["loc"] if part != "body"]
    where = ".".join(path)
    if problem["type"] == "json_invalid":
        return f"The body is not valid JSON: {problem['ctx']['error']}; send a JSON object."
    if not path:
        return "The body is not a JSON object; send one, with Content-Type: application/json."
    if problem["type"] == "extra_forbidden":
        known = f"; the fields are: {', '.join(fields)}" if len(path) == 1 else "; leave it out"
        return f"There is no field {where!r}{known}."
    if problem["type"] == "missing":
        return f"The field {where!r} is missing; give it."
    quoted = repr(problem["input"])
    if len(quoted) > _MAX_QUOTED_CHARACTERS:
        quoted = f"{quoted[:_MAX_QUOTED_CHARACTERS]}..."
    if path[0] == "stop":
        # pydantic complains once per member of the union, under its name.
        return f"The field 'stop' holds {quoted}; expected a string or a list of strings."
    expected = problem["msg"].removeprefix("Input should be ")
    return f"The field {where!r} is {quoted}; expected {expected}."
