"""What the next step computes: one token of each sequence that generates, pieces of prompts, and who joins the batch.

Decides by the queue, the slot bank and the block pool alone; knows nothing of token values, logits or tensors.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cluster.config.serving import EngineSettings
from cluster.engine.block_pool import BLOCK_TOKENS, BlockPool, block_key, blocks_for, root_key
from cluster.engine.fair_queue import FairQueue
from cluster.engine.residency import admissible, loading
from cluster.engine.sequence import Sequence, SequenceStatus
from cluster.engine.slot_bank import SlotBank
from cluster.errors import InvalidInput, Overloaded
from cluster.messages import AdapterRef

MAX_UPCOMING = 64
"""The most adapters that are looked ahead for."""

MAX_WANTED = 16
"""The most tokens of one chunk whose logits are wanted: a row of logits takes as much memory as the vocabulary."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step computes of one sequence: `num_tokens` tokens from its `num_computed`-th on.

    When that reaches the sequence's last token, the next one can be sampled.
    """

    sequence: Sequence
    num_tokens: int

    @property
    def num_wanted(self) -> int:
        """Of how many of its tokens, the last ones, the logits are wanted. To be asked before it is `computed`."""
        start = self.sequence.num_computed
        return max(0, start + self.num_tokens - max(start, self.sequence.first_wanted))


class Scheduler:
    """The waiting sequences, the running ones, and what these hold of the slot bank and the block pool."""

    def __init__(self, bank: SlotBank[Any], pool: BlockPool, settings: EngineSettings, base_fingerprint: str) -> None:
        """`base_fingerprint` tells apart what different bases make of the same tokens."""
        self.running: list[Sequence] = []
        """In the order of their admission."""
        self.num_preemptions = 0
        self._queue = FairQueue()
        self._bank = bank
        self._pool = pool
        self._settings = settings
        self._base_fingerprint = base_fingerprint
        self._num_arrivals = 0
        self._earliest_deadline_s: float | None = None
        """No deadline of a waiting or running sequence lies before this. It may be that of one which has ended."""

    @property
    def waiting(self) -> Mapping[str, Sequence]:
        """The waiting sequences by request id."""
        return self._queue.waiting

    @property
    def next_deadline_s(self) -> float | None:
        """An instant before which no deadline passes; None if there is no deadline."""
        return self._earliest_deadline_s

    def salt_of(self, sequence: Sequence) -> str:
        """What the sequence's keys and values depend on beside its tokens: the base and the exact mixture."""
        return f"{self._base_fingerprint}\n{sequence.mixture.key}"

    def enqueue(self, sequence: Sequence) -> None:
        """Put `sequence` into the queue. Raises `Overloaded` when it is full, `InvalidInput` on an id in use."""
        assert blocks_for(sequence.max_num_tokens) <= self._pool.num_blocks, "alone, a sequence must fit"
        if len(self.waiting) >= self._settings.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting, which is the most; try again in a moment.")
        taken = sequence.request_id in self.waiting
        if taken or any(other.request_id == sequence.request_id for other in self.running):
            raise InvalidInput(f"The request id {sequence.request_id!r} is in use; expected a new one.")
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._note_deadline(sequence)
        self._queue.push(sequence, self._bank.num_steps)

    def can_schedule(self) -> bool:
        """Whether `schedule` would return something."""
        # With nothing running all blocks are free, and any sequence fits.
        return bool(self.running) or any(True for _ in admissible(self._queue.lanes(), self._bank))

    def schedule(self) -> list[Chunk]:
        """What to compute now, in the order of `running`; those admitted now come last.

        Sequences that generate go first, one token each. What is left of max_step_tokens goes to prompts, those begun
        before first. A sequence that generates and finds no block takes those of the least urgent one, which then
        waits again and will be computed anew.
        """
        self._bank.begin_step()
        self._extend_blocks()
        left_tokens = self._settings.max_step_tokens - sum(_is_generating(sequence) for sequence in self.running)
        chunks = []
        for sequence in self.running:
            if _is_generating(sequence):
                chunks.append(Chunk(sequence, 1))
            elif left_tokens > 0:
                chunks.append(_piece(sequence, left_tokens))
                left_tokens -= chunks[-1].num_tokens
        return chunks + self._admit(left_tokens)

    def computed(self, chunk: Chunk) -> None:
        """The keys and values of `chunk` now lie in the cache: call it before the sampled token is added."""
        sequence = chunk.sequence
        first_full = sequence.num_computed // BLOCK_TOKENS
        sequence.num_computed += chunk.num_tokens
        assert sequence.num_computed <= sequence.num_tokens
        num_full = sequence.num_computed // BLOCK_TOKENS
        if self._pool.reuse_prefixes and num_full > first_full:
            keys = self._keys_of(sequence, num_full)
            for index in range(first_full, num_full):
                self._pool.register(sequence.blocks[index], keys[index])
        if sequence.num_computed == sequence.num_tokens:
            self._queue.charge(sequence, 1)

    def retire(self, sequence: Sequence, status: SequenceStatus) -> None:
        """Take a running sequence out for good, with all that it holds."""
        self._release(sequence)
        sequence.status = status

    def withdraw(self, request_id: str) -> Sequence | None:
        """Take a waiting sequence out of the queue, and leave its status to the caller; None if none has this id."""
        return self._queue.remove(request_id) if request_id in self.waiting else None

    def expired(self, now_s: float) -> list[Sequence]:
        """Take out, and mark as dropped, the sequences whose deadline lies at or before `now_s`."""
        if self._earliest_deadline_s is None or now_s < self._earliest_deadline_s:
            return []
        self._earliest_deadline_s = None
        late = []
        for sequence in [*self.running, *self.waiting.values()]:
            if sequence.deadline_s is None or now_s < sequence.deadline_s:
                self._note_deadline(sequence)
                continue
            if sequence.status is SequenceStatus.RUNNING:
                self._release(sequence)
            else:
                self._queue.remove(sequence.request_id)
            sequence.status = SequenceStatus.DROPPED
            late.append(sequence)
        return late

    def wanted(self) -> tuple[AdapterRef, ...]:
        """The adapters to fetch now, for those whose turn it is first: not resident, and with room to come."""
        return loading(self._queue.lanes(), self._bank).refs

    def upcoming(self) -> tuple[AdapterRef, ...]:
        """The adapters to fetch later, for those whose turn comes then: not resident, and no room yet."""
        if not self.waiting:
            return ()
        lanes = self._queue.lanes()
        found = dict.fromkeys(ref for lane in lanes for ref in sorted(lane.refs) if ref not in self._bank.resident)
        now = set(loading(lanes, self._bank).refs)
        return tuple(islice((ref for ref in found if ref not in now), MAX_UPCOMING))

    def spared_for(self, ref: AdapterRef) -> set[AdapterRef]:
        """What may not be evicted for `ref`."""
        return loading(self._queue.lanes(), self._bank).held - {ref}

    def check_integrity(self) -> None:
        """Assert what must hold between steps, on the real objects: queue, statuses, pins, blocks, what they hold."""
        self._queue.check_integrity(self.running)
        self._bank.check_integrity(Counter(ref for sequence in self.running for ref in sequence.refs))
        self._pool.check_integrity(sequence.blocks for sequence in self.running)
        assert len(self.running) <= self._settings.max_batch_size
        assert not {sequence.request_id for sequence in self.running} & self.waiting.keys()
        for sequence in self.waiting.values():
            assert sequence.status is SequenceStatus.WAITING
            assert not sequence.blocks
            assert not sequence.num_computed
        for sequence in self.running:
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence.num_reused <= sequence.num_computed <= sequence.num_tokens
            assert blocks_for(sequence.num_computed) <= len(sequence.blocks) <= blocks_for(sequence.num_tokens)
            if self._pool.reuse_prefixes:
                num_full = sequence.num_computed // BLOCK_TOKENS
                keys = self._keys_of(sequence, num_full)
                self._pool.check_contents(sequence.blocks[:num_full], keys)
        deadlines = [s.deadline_s for s in [*self.running, *self.waiting.values()] if s.deadline_s is not None]
        assert not deadlines or (self._earliest_deadline_s is not None and self._earliest_deadline_s <= min(deadlines))

    def _extend_blocks(self) -> None:
        """Give each running sequence a block for its newest token if it needs one; preempt where none is free."""
        for sequence in list(self.running):
            while sequence.status is SequenceStatus.RUNNING and len(sequence.blocks) < blocks_for(sequence.num_tokens):
                if (block := self._pool.allocate(1)) is not None:
                    sequence.blocks += block
                else:
                    self._preempt(max(self.running, key=_urgency))

    def _preempt(self, sequence: Sequence) -> None:
        """Put a running sequence back to the front of its lane; its generated tokens become part of what to compute."""
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed = sequence.num_reused = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._queue.push_front(sequence, self._bank.num_steps)
        self._release(sequence)

    def _admit(self, left_tokens: int) -> list[Chunk]:
        """Start waiting sequences in turn while there are places, tokens and blocks; their first chunks."""
        chunks: list[Chunk] = []
        num_places = min(left_tokens, self._settings.max_batch_size - len(self.running))
        if not self.waiting or num_places <= 0:
            return chunks
        lanes = islice(admissible(self._queue.lanes(), self._bank), num_places)
        for sequence in self._queue.turns(lanes):
            # Whose turn it is waits for blocks with all behind it: else a long prompt would never find enough.
            if not self._take_blocks(sequence):
                break
            self._queue.start(sequence, self._bank.num_steps)
            if not sequence.num_preemptions:
                self._queue.charge(sequence, sequence.num_tokens - sequence.num_computed)
            self._bank.pin(sequence.refs)
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            chunks.append(_piece(sequence, left_tokens))
            left_tokens -= chunks[-1].num_tokens
            if left_tokens <= 0 or len(chunks) == num_places:
                break
        return chunks

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens, unless somebody would soon be preempted for it.

        One block for each sequence that will outgrow its own, this one included, must stay free beside: so nobody is
        preempted within BLOCK_TOKENS steps of an admission. Alone a sequence needs no reserve.
        """
        found = self._pool.find_prefix(self._reusable_keys(sequence))
        num_new = blocks_for(sequence.num_tokens) - len(found)
        num_growing = sum(len(s.blocks) < blocks_for(s.max_num_tokens) for s in self.running)
        num_growing += blocks_for(sequence.num_tokens) < blocks_for(sequence.max_num_tokens)
        reserve = num_growing if self.running else 0
        new = self._pool.allocate(num_new) if num_new + reserve <= self._pool.num_free else None
        if new is None:
            self._pool.free(found)
            return False
        sequence.blocks = found + new
        sequence.num_computed = sequence.num_reused = len(found) * BLOCK_TOKENS
        return True

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._queue.end(sequence)
        self._bank.unpin(sequence.refs)
        self._pool.free(sequence.blocks)
        sequence.blocks = []

    def _reusable_keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that may be found: none with a token whose logits are wanted, which must be computed."""
        return self._keys_of(sequence, sequence.first_wanted // BLOCK_TOKENS) if self._pool.reuse_prefixes else []

    def _keys_of(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """The keys of the sequence's first blocks, which are full."""
        keys = sequence.block_keys
        if len(keys) < num_blocks:
            token_ids = sequence.token_ids
            for start in range(len(keys) * BLOCK_TOKENS, num_blocks * BLOCK_TOKENS, BLOCK_TOKENS):
                parent = keys[-1] if keys else root_key(self.salt_of(sequence))
                keys.append(block_key(parent, token_ids[start : start + BLOCK_TOKENS]))
        return keys[:num_blocks]

    def _note_deadline(self, sequence: Sequence) -> None:
        if sequence.deadline_s is not None:
            earliest_s = self._earliest_deadline_s
            self._earliest_deadline_s = min(
                sequence.deadline_s, sequence.deadline_s if earliest_s is None else earliest_s
            )


def _is_generating(sequence: Sequence) -> bool:
    """Whether all of its tokens but the newest have been computed."""
    return sequence.num_computed == sequence.num_tokens - 1


def _piece(sequence: Sequence, left_tokens: int) -> Chunk:
    """The next of what it has yet to read."""
    start = sequence.num_computed
    end = min(start + left_tokens, sequence.num_tokens, max(start, sequence.first_wanted) + MAX_WANTED)
    return Chunk(sequence, end - start)


def _urgency(sequence: Sequence) -> tuple[int, int]:
    """The lowest keeps its blocks longest."""
    return sequence.priority, sequence.arrival
