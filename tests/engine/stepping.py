"""A scheduler with a slot bank and a block pool, stepped with a forward pass of a few lines.

The pass remembers in each place of each block which tokens, of which base and mixture, it was written for, and reads
all that comes before: so a block lost, shared wrongly or overwritten is noticed when it matters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

from cluster.config.serving import EngineSettings
from cluster.engine.block_pool import BLOCK_TOKENS, BlockPool, blocks_for
from cluster.engine.detokenizer import Detokenizer
from cluster.engine.scheduler import Chunk, Scheduler
from cluster.engine.sequence import Sequence, SequenceStatus
from cluster.engine.slot_bank import SlotBank
from cluster.messages import AdapterRef, Mixture, SamplingParams
from cluster.model.tokenizer import train_tokenizer

UNIT_BYTES = 8


@dataclass(frozen=True)
class SizedAdapter:
    """All that the slot bank knows of an adapter."""

    num_bytes: int


def adapter_of(num_units: int) -> SizedAdapter:
    """An adapter of so many times UNIT_BYTES."""
    return SizedAdapter(num_units * UNIT_BYTES)


def ref(name: str) -> AdapterRef:
    """The first version of a domain's adapter."""
    return AdapterRef(name, 1)


@cache
def _detokenizer() -> Detokenizer:
    """One for all sequences: nothing here turns tokens into text."""
    return Detokenizer(train_tokenizer(["a text"], 300, 64))


def mixture_of(names: Iterable[str]) -> Mixture:
    """The sum of the named adapters."""
    return Mixture.of({ref(name): 1.0 for name in names})


def make_sequence(
    request_id: str,
    mixture: str | Mixture = "",
    *,
    prompt: int | list[int] = 8,
    max_tokens: int = 8,
    priority: int = 0,
    deadline_s: float | None = None,
) -> Sequence:
    """A sequence of a mixture, or of the adapters with these one-letter names; `prompt` may be just a length."""
    return Sequence(
        request_id=request_id,
        prompt_ids=[1] * prompt if isinstance(prompt, int) else prompt,
        mixture=mixture_of(mixture) if isinstance(mixture, str) else mixture,
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=0,
        detokenizer=_detokenizer(),
        priority=priority,
        deadline_s=deadline_s,
    )


def values_for(salt: str, token_ids: list[int], known: list[bytes]) -> list[bytes]:
    """What is written for each token: it depends on all tokens so far and `salt`. `known` are the first of them."""
    values = list(known)
    for token in token_ids[len(known) :]:
        before = values[-1] if values else salt.encode()
        values.append(blake2b(before + token.to_bytes(4), digest_size=8).digest())
    return values


def next_token(value: bytes) -> int:
    """The fake model: the token after the one that `value` was written for."""
    return value[0] % 3


class Stepper:
    """What an engine does with the scheduler, without a model."""

    def __init__(
        self,
        num_adapters: int = 8,
        num_blocks: int = 1000,
        *,
        reuse_prefixes: bool = True,
        base: str = "base",
        size_of: Callable[[AdapterRef], int] = lambda _: 1,
        **settings: int,
    ) -> None:
        """Room for `num_adapters` adapters of one unit; `size_of` says how many units an adapter has."""
        self.settings = EngineSettings(**{"max_batch_size": 4, "max_step_tokens": 64, **settings})
        self.bank: SlotBank[SizedAdapter] = SlotBank(num_adapters * UNIT_BYTES, on_evict=lambda _: None)
        self.pool = BlockPool(num_blocks, reuse_prefixes)
        self.scheduler = Scheduler(self.bank, self.pool, self.settings, base)
        self.finished: list[Sequence] = []
        self.num_steps = 0
        self.num_loads = 0
        self._size_of = size_of
        self._written: list[list[bytes]] = [[b""] * BLOCK_TOKENS for _ in range(num_blocks)]
        self._values: dict[Sequence, list[bytes]] = {}

    def submit(self, *args: object, **kwargs: object) -> Sequence:
        """Make a sequence and put it into the queue."""
        sequence = make_sequence(*args, **kwargs)  # type: ignore[arg-type]  # handed through
        self.scheduler.enqueue(sequence)
        return sequence

    def load(self, loaded: AdapterRef) -> list[Sequence]:
        """Give the bank an adapter, and return the sequences that turn out to need more than the whole bank."""
        self.num_loads += loaded not in self.bank.resident
        self.bank.add(loaded, adapter_of(self._size_of(loaded)), self.scheduler.spared_for(loaded))
        waiting = list(self.scheduler.waiting.values())
        beyond = [s for s in waiting if self.bank.known_bytes(s.refs) > self.bank.budget_bytes]
        for sequence in beyond:
            self.scheduler.withdraw(sequence.request_id)
            sequence.status = SequenceStatus.DROPPED
        return beyond

    def step(self) -> list[Chunk]:
        """Load what is wanted, then compute what is scheduled."""
        for wanted in self.scheduler.wanted():
            self.load(wanted)
        return self.compute()

    def compute(self) -> list[Chunk]:
        """One step of the engine with the adapters that are there."""
        could_schedule = self.scheduler.can_schedule()
        chunks = self.scheduler.schedule()
        self.num_steps += 1
        assert bool(chunks) == could_schedule
        assert sum(chunk.num_tokens for chunk in chunks) <= self.settings.max_step_tokens
        in_chunks = [chunk.sequence for chunk in chunks]
        assert in_chunks == [s for s in self.scheduler.running if s in in_chunks], "not in the order of running"
        for chunk in chunks:
            self._forward(chunk)
        self.scheduler.check_integrity()
        return chunks

    def run(self, max_steps: int = 5000) -> list[Sequence]:
        """Step until nothing runs or waits; return all that have finished, in order."""
        for _ in range(max_steps):
            if not (self.scheduler.running or self.scheduler.waiting):
                return self.finished
            assert self.scheduler.can_schedule() or self.scheduler.wanted(), "it came to a halt with work left"
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps")

    def expected(self, sequence: Sequence) -> list[int]:
        """What the fake model generates for `sequence`, alone and without any cache."""
        salt, ids = self.scheduler.salt_of(sequence), list(sequence.prompt_ids)
        values: list[bytes] = []
        for _ in range(sequence.sampling.max_tokens):
            values = values_for(salt, ids, values)
            ids.append(next_token(values[-1]))
        return ids[len(sequence.prompt_ids) :]

    def _forward(self, chunk: Chunk) -> None:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        assert self.bank.holds(sequence.refs)
        salt = self.scheduler.salt_of(sequence)
        values = values_for(salt, sequence.token_ids, self._values.get(sequence, []))
        self._values[sequence] = values
        end = start + chunk.num_tokens
        own = set(sequence.blocks[start // BLOCK_TOKENS : blocks_for(end)])
        assert all(own.isdisjoint(s.blocks) for s in self.scheduler.running if s is not sequence), "a shared write"
        for position in range(start, end):
            self._written[sequence.blocks[position // BLOCK_TOKENS]][position % BLOCK_TOKENS] = values[position]
        read = [value for block in sequence.blocks[: blocks_for(end)] for value in self._written[block]]
        assert read[:end] == values[:end], "the cache holds something else"
        self.scheduler.computed(chunk)
        if end == sequence.num_tokens:
            sequence.generated_ids.append(next_token(values[-1]))
            if len(sequence.generated_ids) == sequence.sampling.max_tokens:
                self.scheduler.retire(sequence, SequenceStatus.FINISHED)
                self.finished.append(sequence)
                del self._values[sequence]
