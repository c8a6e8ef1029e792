"""One request on its way through the engine: what was asked, what has been generated, where it stands."""

from dataclasses import dataclass, field
from enum import Enum

from cluster.engine.detokenizer import Detokenizer
from cluster.messages import AdapterRef, Mixture, SamplingParams


class SequenceStatus(Enum):
    """The whole life of a sequence: WAITING, then RUNNING, then one of the other three; or from WAITING to an end."""

    WAITING = "waiting"
    """In the queue, for a place in the batch, for an adapter, or for both."""
    RUNNING = "running"
    """Holds a row of the KV cache and pins its adapters."""
    FINISHED = "finished"
    """Came to its own end: a stop, max_tokens, or logits that are not numbers."""
    CANCELLED = "cancelled"
    """The client left."""
    DROPPED = "dropped"
    """An adapter it needs cannot be had."""


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
    generated_ids: list[int] = field(default_factory=list)
    num_emitted: int = 0
    """How many of `generated_ids` have left in a chunk."""
    status: SequenceStatus = SequenceStatus.WAITING
    row: int | None = None
    """Its row of the KV cache, while running."""
    num_overtaken: int = 0
    """Sequences with adapters of their own that were admitted from behind it."""
    refs: frozenset[AdapterRef] = field(init=False)
    """The adapters it needs, all at once."""

    def __post_init__(self) -> None:
        self.refs = frozenset(self.mixture.refs)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_ids) + len(self.generated_ids)

    @property
    def last_id(self) -> int:
        """The newest token: what the next decode step reads."""
        return self.generated_ids[-1] if self.generated_ids else self.prompt_ids[-1]
