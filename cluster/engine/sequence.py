"""One request on its way through the engine: what was asked, what has been generated, where it stands."""

from dataclasses import dataclass, field
from enum import Enum

from cluster.engine.detokenizer import Detokenizer
from cluster.messages import AdapterRef, Mixture, SamplingParams, TokenLogprob


class SequenceStatus(Enum):
    """The whole life of a sequence: WAITING, then RUNNING, perhaps so more than once; then one of the other three."""

    WAITING = "waiting"
    """In the queue, for a place in the batch, for blocks of the KV cache, for an adapter, or for several of these."""
    RUNNING = "running"
    """Holds blocks of the KV cache and pins its adapters."""
    FINISHED = "finished"
    """Came to its own end: a stop, max_tokens, its answer scored, or logits that are not numbers."""
    CANCELLED = "cancelled"
    """The client left."""
    DROPPED = "dropped"
    """Its deadline passed, or an adapter it needs cannot be had."""


@dataclass(eq=False, slots=True)
class Sequence:
    """The state of one request. Only the engine and its parts change it."""

    request_id: str
    prompt_ids: list[int]
    mixture: Mixture
    sampling: SamplingParams
    seed: int
    """The request's own, or one drawn when it was submitted."""
    detokenizer: Detokenizer
    priority: int = 0
    """Lower goes first."""
    deadline_s: float | None = None
    """The instant of `time.monotonic()` from which on nobody waits for its answer."""
    answer_ids: tuple[int, ...] = ()
    """Tokens to be scored; nothing is generated then. All but the last also end `prompt_ids`: they are read like it."""
    generated_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each of `generated_ids`, where the request asked for them; or of `answer_ids`, as far as they are scored;
    else none."""
    num_emitted: int = 0
    """How many of `generated_ids` have left in a chunk."""
    status: SequenceStatus = SequenceStatus.WAITING
    blocks: list[int] = field(default_factory=list)
    """Its blocks of the KV cache, in the order of positions; empty while it waits."""
    num_computed: int = 0
    """Tokens, from the first on, whose keys and values lie in its blocks."""
    num_reused: int = 0
    """How many of these were found in the cache when it was last admitted."""
    num_preemptions: int = 0
    """How often it had to give back its blocks to others and wait again."""
    arrival: int = 0
    """How many sequences the scheduler had been given before."""
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of its full blocks, in order, as far as they have been needed."""
    refs: frozenset[AdapterRef] = field(init=False)
    """The adapters it needs, all at once."""

    def __post_init__(self) -> None:
        self.refs = frozenset(self.mixture.refs)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and generated tokens."""
        return self.prompt_ids + self.generated_ids

    def tokens(self, start: int, end: int) -> list[int]:
        """`token_ids[start:end]`, without joining the lists."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.generated_ids[start - num_prompt : end - num_prompt]
        return self.prompt_ids[start:end] + self.generated_ids[: max(0, end - num_prompt)]

    @property
    def num_tokens(self) -> int:
        """How many tokens it has, prompt and generated."""
        return len(self.prompt_ids) + len(self.generated_ids)

    @property
    def first_wanted(self) -> int:
        """The position from which on logits are wanted: the newest token's, or the one before a given answer."""
        return self.num_tokens - (len(self.answer_ids) or 1)

    @property
    def max_num_tokens(self) -> int:
        """How many tokens it can come to have."""
        return len(self.prompt_ids) + self.sampling.max_tokens

    @property
    def last_id(self) -> int:
        """The newest token."""
        return self.generated_ids[-1] if self.generated_ids else self.prompt_ids[-1]
