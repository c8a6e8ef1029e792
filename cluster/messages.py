"""The nouns that cross a process border: plain, frozen, picklable.

Knows nothing of tensors, tokenizers, HTTP or Ray. Everything behind the Gateway speaks `AdapterRef`s, so that
publishing a new version never changes a request in flight.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from cluster.errors import InvalidInput, InvalidMixture

NONE_DOMAIN = "none"
"""The router's answer for a prompt of no domain; no domain may bear this name."""

BASE_DOMAIN = "base"
"""Training data for the base alone, as if it were a domain; none may bear this name either."""

RESERVED_NAMES = frozenset({NONE_DOMAIN, BASE_DOMAIN, "zephyra"})

MAX_MIXTURE_ENTRIES = 1024
"""The most adapters that one request may mix."""

MAX_CO_BATCHED = 8
"""A mixture of up to so many adapters is answered through all of them, exactly; a larger one is merged to one first."""

WEIGHT_STEP = 1 / 64
"""The router's weights are multiples of this, so that mixtures recur and what they need can be cached."""

MAX_PROBABILITIES = 32
"""The most domains whose probabilities the router names: among thousands the others' are next to nothing."""

SEEDS = 2**63
"""How many seeds there are, from 0."""

MAX_CHOICES = 16
"""The most answers to one prompt that one request may ask for."""

MAX_TIMEOUT_S = 86_400.0
"""A day."""

_VERSION_PATTERN = re.compile(r"0|[1-9][0-9]{0,17}")
_DOMAIN_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


def check_domain_name(name: str) -> str:
    """Return `name` if it can name a domain (it becomes a folder and a metric label), else raise `InvalidInput`."""
    if not _DOMAIN_PATTERN.fullmatch(name) or name in RESERVED_NAMES:
        raise InvalidInput(
            f"{name!r} cannot name a domain: use up to 63 of a-z, 0-9, '-' and '_', starting with a letter or digit, "
            f"and none of {', '.join(sorted(RESERVED_NAMES))}."
        )
    return name


@dataclass(frozen=True, slots=True, order=True)
class AdapterRef:
    """One published version of one domain's adapter, written `domain@version`. What it names never changes."""

    domain: str
    version: int

    def __str__(self) -> str:
        return f"{self.domain}@{self.version}"

    @classmethod
    def parse(cls, text: str) -> "AdapterRef":
        """The inverse of `str`. Raises `InvalidInput` for anything else."""
        domain, _, version = text.partition("@")
        if not _VERSION_PATTERN.fullmatch(version):
            raise InvalidInput(f"{text!r} is not an adapter ref: expected domain@version, such as law@3.")
        return cls(check_domain_name(domain), int(version))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Which adapters answer a prompt, and with which weights. Empty means the plain base.

    `entries` is sorted by ref, so that equal mixtures are equal objects whatever order they were asked in.
    """

    entries: tuple[tuple[AdapterRef, float], ...] = ()

    @classmethod
    def of(cls, weights: Mapping[AdapterRef, float]) -> "Mixture":
        """Sort `weights`, dropping zeros. Raises `InvalidMixture` on NaN, infinite, negative or all-zero weights."""
        check_weights({str(ref): weight for ref, weight in weights.items()})
        return cls(tuple(sorted((ref, float(weight)) for ref, weight in weights.items() if weight > 0)))

    @property
    def refs(self) -> tuple[AdapterRef, ...]:
        return tuple(ref for ref, _ in self.entries)

    @property
    def key(self) -> str:
        """The mixture as one canonical string: equal keys mean equal deltas."""
        return "+".join(f"{ref}*{weight!r}" for ref, weight in self.entries)


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise `InvalidMixture` unless `weights` is empty or holds finite, non-negative numbers, one of them positive."""
    if len(weights) > MAX_MIXTURE_ENTRIES:
        raise InvalidMixture(f"The mixture has {len(weights)} entries; the most is {MAX_MIXTURE_ENTRIES}.")
    for name, weight in weights.items():
        # False for NaN too, and for an integer beyond any float.
        if not 0 <= weight <= sys.float_info.max:
            raise InvalidMixture(f"The weight of {name} is {weight}; expected a finite number that is not negative.")
    if weights and not any(weights.values()):
        raise InvalidMixture(f"All weights are zero ({', '.join(weights)}); give one above zero, or ask for 'base'.")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Greedy by default."""

    max_tokens: int = 128
    """The most tokens to generate, at least 1."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the model's own distribution. At most 10."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities sum to at least this, in (0, 1]."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 for all."""
    seed: int | None = None
    """The same seed, prompt and mixture give the same tokens, whatever runs beside them."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these; at most 16."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability, from 0 to 1."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens in the prompt and the answer so far, multiplies negative ones; from 0.01 to 100."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer so far, from -2 to 2."""
    frequency_penalty: float = 0.0
    """The same, times how often the token occurs in the answer so far."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and what is added to their logits, from -100 to 100; at most 300."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with the first of these, as with the model's own end; at most 64."""
    ignore_eos: bool = False
    """The model's own end ends nothing."""
    logprobs: int | None = None
    """Report each token's log-probability and so many likeliest tokens', 0 to 20, before bias, penalties and
    temperature; none for neither."""

    def __post_init__(self) -> None:
        biased = [token_id for token_id, _ in self.logit_bias]
        bias_ok = len(set(biased)) == len(biased) and all(-100 <= bias <= 100 for _, bias in self.logit_bias)
        for name, value, ok, expected in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature <= 10, "a number from 0 to 10"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < SEEDS, "0 to 2**63-1, or none"),
            ("stop", self.stop, len(self.stop) <= 16 and all(self.stop), "at most 16 strings, none empty"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "a number from -2 to 2"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "a number from -2 to 2"),
            ("logit_bias", self.logit_bias, len(biased) <= 300, "at most 300 tokens"),
            ("logit_bias", self.logit_bias, bias_ok, "each token once, with a number from -100 to 100"),
            ("stop_token_ids", self.stop_token_ids, len(self.stop_token_ids) <= 64, "at most 64 tokens"),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20, or none"),
        ):
            if not ok:
                raise InvalidInput(f"{name} is {value!r}; expected {expected}.")


def check_vocabulary(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise `InvalidInput` if `sampling` names a token that a model of so many tokens does not have."""
    named = {"logit_bias": [token_id for token_id, _ in sampling.logit_bias], "stop_token_ids": sampling.stop_token_ids}
    for name, token_ids in named.items():
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidInput(f"{name} names token {token_id}; the model's tokens are 0 to {vocab_size - 1}.")


class Role(Enum):
    """Who speaks in a chat."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat."""

    role: Role
    content: str


Prompt = str | tuple[ChatMessage, ...]
"""A completion's prompt, or a chat's turns, the last of them the user's."""

MAX_PROMPT_CHARACTERS = 1_000_000
"""A prompt beyond this is refused before anything reads it; the model's context is the tighter limit."""


def check_prompt(prompt: Prompt) -> None:
    """Raise `InvalidInput` for a prompt that is empty, beyond the size limit or not encodable as UTF-8."""
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    if not any(text.strip() for text in texts):
        raise InvalidInput("The prompt is empty; give at least one character that is not a space.")
    size = sum(len(text) for text in texts)
    if size > MAX_PROMPT_CHARACTERS:
        raise InvalidInput(f"The prompt has {size} characters; the most is {MAX_PROMPT_CHARACTERS}.")
    if not isinstance(prompt, str) and prompt[-1].role is not Role.USER:
        raise InvalidInput(f"The last message is the {prompt[-1].role.value}'s; expected the user's.")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"The prompt is not valid UTF-8 at character {error.start}; send text without lone surrogates."
            ) from None


MAX_ROUTED_TURNS = 8
"""The router reads at most so many of a user's last turns in a chat."""


def turns_to_route(prompt: Prompt) -> tuple[str, ...]:
    """What the router reads, oldest first: the prompt, or of a chat the user's last turns, the newest decided upon."""
    if isinstance(prompt, str):
        return (prompt,)
    return tuple(message.content for message in prompt if message.role is Role.USER)[-MAX_ROUTED_TURNS:]


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """What a client asked for, over HTTP or gRPC, before routing."""

    prompt: Prompt
    model: str = "zephyra"
    """`zephyra` (the router decides), `zephyra:<domain>`, or `base`."""
    mixture: Mapping[str, float] | None = None
    """Domain to weight: overrides `model` and skips the router. Names may be `domain` or `domain@version`."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_choices: int = 1
    """So many answers to the one prompt, at most `MAX_CHOICES`; with a seed, each has the one after the last one's."""
    priority: int = 0
    """Lower goes first."""
    timeout_s: float | None = None
    """Give the request up, with `DeadlineExceeded`, when it has not been answered by then; at most a day."""

    def __post_init__(self) -> None:
        timeout_ok = self.timeout_s is None or 0 < self.timeout_s <= MAX_TIMEOUT_S
        for name, value, ok, expected in (
            ("n", self.num_choices, 1 <= self.num_choices <= MAX_CHOICES, f"1 to {MAX_CHOICES}"),
            ("priority", self.priority, -(2**31) <= self.priority < 2**31, "-2**31 to 2**31-1"),
            ("timeout_s", self.timeout_s, timeout_ok, f"above 0 and at most {MAX_TIMEOUT_S:g} seconds, or none"),
        ):
            if not ok:
                raise InvalidInput(f"{name} is {value!r}; expected {expected}.")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a base replica is asked for: everything resolved, nothing left to look up."""

    request_id: str
    prompt: Prompt
    mixture: Mixture
    sampling: SamplingParams
    priority: int = 0
    """Lower goes first."""
    timeout_s: float | None = None
    """From its arrival at the engine; `DeadlineExceeded` ends it after that."""
    answer: str | None = None
    """Not to be generated but scored: one chunk says its tokens and their log-probabilities; `sampling` is not read."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What a base replica is asked for where the answers are given: how likely each is. Everything is resolved."""

    request_id: str
    prompt: Prompt
    mixture: Mixture
    answers: tuple[str, ...]
    """At least one, each as in `GenerateRequest.answer`."""
    priority: int = 0
    """Lower goes first."""
    timeout_s: float | None = None
    """From its arrival at the replica, for all of them together."""


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """What tiny ada says of one prompt."""

    probabilities: Mapping[str, float]
    """The likeliest domains, at most `MAX_PROBABILITIES`, in the order of their names, and "none"; the domains that are
    not named have what is missing to 1."""
    weights: Mapping[str, float]
    """The domains to mix, at most 3, weights normalised over them and multiples of 1/64; empty for the plain base."""
    compute_ms: float = 0.0
    """What scoring took inside the router."""


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """The model ended its answer, or a stop string or stop token was reached."""
    LENGTH = "length"
    """max_tokens were generated."""
    CANCELLED = "cancelled"
    """The client left."""
    ERROR = "error"
    """The model gave something that is not a number; nothing more can be drawn."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and how likely the model held it to be, whatever was then made of that to draw one."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability."""
    text: str
    """For people: bytes that are no character are written as \\xe2, a special token as its name."""
    text_bytes: bytes | None
    """What it adds to the answer; None for a special token, which adds nothing."""
    top: tuple["TokenLogprob", ...] = ()
    """The likeliest tokens at its position, as many as were asked for, likeliest first; their own `top` is empty."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """How a mixture of many adapters was merged to one, and what is certain of it."""

    method: str
    rank: int
    bound: float
    """At least the Frobenius distance, over all layers, between the exact weighted sum and what answers."""
    kept_energy: float
    """At least this share of the sum's squared norm is kept."""


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """How likely a model held one given answer."""

    logprob: float
    """Natural logarithm: the sum over its tokens, each given the prompt and the tokens before; none for an end."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """A base replica's answer to a `ScoreRequest`."""

    scores: tuple[AnswerScore, ...]
    """In the order of its answers."""
    prompt_tokens: int
    """Length of the prompt."""
    merged: MergeReport | None = None
    """Where the mixture was merged to one adapter."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """A piece of a streamed answer. Texts of all chunks joined are the answer; no chunk splits a UTF-8 character."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    """Set on the last chunk only."""
    prompt_tokens: int = 0
    """Length of the prompt; set on the last chunk."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token id, if the request asked for them."""
    merged: MergeReport | None = None
    """On the first chunk, where the mixture was merged to one adapter."""
