"""What OpenAI's clients send, as pydantic models, and its translation to a `ClientRequest`.

Unknown fields are refused: a misspelt one would otherwise be ignored without a word. Some that OpenAI's clients send
and that mean nothing here are accepted, as long as the answer is what their sender expects; each says so.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag

from cluster.errors import InvalidInput
from cluster.messages import ChatMessage, ClientRequest, Prompt, Role, SamplingParams

_MAX_QUOTED_CHARACTERS = 80
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_ROLES = {**{role.value: role for role in Role}, "developer": Role.SYSTEM}
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
)
"""Named here as in `SamplingParams`."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = False
    """Send one more event, with the token counts, before the end."""


class TextPart(_Body):
    """A piece of a message's text; pieces of other kinds are refused."""

    type: Literal["text"]
    text: str


_TEXT, _PARTS = "as text", "as parts"
"""pydantic names the form that was found in the path of a complaint; the client did not."""

_Content = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[TextPart], Tag(_PARTS)],
    Discriminator(lambda given: _PARTS if isinstance(given, list) else _TEXT),
]


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer name for `system`."""
    content: _Content
    """Text, or parts of it, which are joined by line breaks, as vLLM does."""
    refusal: None = None
    """As an answer holds it that is sent back."""


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
    stop_token_ids: list[int] | None = None
    """As vLLM's: the answer ends with the first of these."""
    min_p: float | None = None
    """As vLLM's: leave out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float | None = None
    """As vLLM's, over the prompt and the answer; 1, the default, changes nothing."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """Token ids, as strings, and what is added to their logits."""
    ignore_eos: bool | None = None
    """As vLLM's: go on past the model's own end, up to max_tokens."""
    n: int | None = None
    """So many answers, each with an index."""
    priority: int | None = None
    """As vLLM's: lower goes first."""
    timeout_s: float | None = None
    """Ours: give up, with status 504, when the answer is not complete by then."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted; nothing depends on it."""
    safety_identifier: str | None = None
    """OpenAI's newer name for `user`. Accepted; nothing depends on it."""
    prompt_cache_key: str | None = None
    """Accepted; prefixes are found again without it."""
    store: bool | None = None
    """Accepted; no answer is kept, whatever it says."""
    metadata: dict[str, str] | None = None
    """Of answers that are stored. Accepted; none is."""
    service_tier: Literal["auto", "default"] | None = None
    """Accepted; there is one tier."""

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_choices(self) -> int:
        """How many answers are asked for."""
        return 1 if self.n is None else self.n

    def client_request(self, prompt: Prompt, max_tokens: int | None, logprobs: int | None) -> ClientRequest:
        """This request in our own words. Raises `InvalidInput` for a value out of its range."""
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options is given, stream is false; leave it out or set stream to true.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = SamplingParams(
            seed=self.seed,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=token_biases(self.logit_bias or {}),
            logprobs=logprobs,
            **_present(max_tokens=max_tokens, **{name: getattr(self, name) for name in _SAMPLING_FIELDS}),
        )
        limits = _present(num_choices=self.n, priority=self.priority, timeout_s=self.timeout_s)
        return ClientRequest(prompt, self.model, self.mixture, sampling, **limits)


class TextFormat(_Body):
    """What an answer must look like: text is all there is."""

    type: Literal["text"]


class CompletionBody(_Generation):
    """The body of POST /v1/completions."""

    prompt: str
    echo: Literal[False] | None = None
    """Accepted; the prompt is not repeated."""
    best_of: Literal[1] | None = None
    """Accepted; every answer that is made is given."""
    suffix: Literal[""] | None = None
    """Accepted; nothing follows the answer."""
    logprobs: int | None = None
    """Report each token's log-probability, and those of so many likeliest tokens."""

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer reports log-probabilities."""
        return self.logprobs is not None

    def translate(self) -> ClientRequest:
        """As a `ClientRequest`. Raises `InvalidInput`."""
        return self.client_request(self.prompt, self.max_tokens, self.logprobs)


class ChatBody(_Generation):
    """The body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    """OpenAI's newer name for max_tokens."""
    logprobs: bool | None = None
    """Report each token's log-probability."""
    top_logprobs: int | None = None
    """And those of so many likeliest tokens."""
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    """Accepted; answers are text."""
    reasoning_effort: Literal["none"] | None = None
    """Accepted; nothing is thought before the answer."""
    tools: list[Any] | None = None
    """Accepted while empty: no tool is ever called."""
    tool_choice: Literal["none", "auto"] | None = None
    """Accepted, as there are no tools to choose from."""
    parallel_tool_calls: bool | None = None
    """Accepted, as there are no tools to call."""

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer reports log-probabilities."""
        return bool(self.logprobs)

    def translate(self) -> ClientRequest:
        """As a `ClientRequest`. Raises `InvalidInput`."""
        if self.tools:
            raise InvalidInput(f"There are {len(self.tools)} tools, and none is ever called; leave the field out.")
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidInput(f"max_tokens is {old} and max_completion_tokens is {new}; give one of them.")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput(f"top_logprobs is {self.top_logprobs}, logprobs is not true; set it, or leave both out.")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.client_request(chat(self.messages), new if new is not None else old, logprobs)


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
    return tuple(ChatMessage(_ROLES[message.role], _text(message.content)) for message in messages)


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def token_biases(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """OpenAI's logit_bias in our own words. Raises `InvalidInput` for a key that is no token id."""
    for key in biases:
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidInput(f"logit_bias has the key {_quoted(key)}; expected token ids as strings, such as '17'.")
    return tuple(sorted((int(key), bias) for key, bias in biases.items()))


def _present(**values: Any) -> Any:
    """Those that were given: null, as OpenAI's clients send it, means the default."""
    return {name: value for name, value in values.items() if value is not None}


def sentence(problem: Mapping[str, Any], fields: Sequence[str]) -> str:
    """One of pydantic's complaints, as a sentence for the client. `fields` are those the body may have.

    Where it is begins with body, query or header.
    """
    path = [str(part) for part in problem["loc"][1:] if part not in (_TEXT, _PARTS)]
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
    quoted = _quoted(problem["input"])
    if path[0] == "stop":
        # pydantic complains once per member of the union, under its name.
        return f"The field 'stop' holds {quoted}; expected a string or a list of strings."
    expected = problem["msg"].removeprefix("Input should be ")
    return f"The field {where!r} is {quoted}; expected {expected}."


def _quoted(value: object) -> str:
    """What was given, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED_CHARACTERS else f"{text[:_MAX_QUOTED_CHARACTERS]}..."
