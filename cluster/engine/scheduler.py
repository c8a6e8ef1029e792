"""Who runs next: first come, first served, except that a sequence waiting for an adapter holds up nobody behind it.

Decides by the queue and the slot bank alone; knows nothing of tokens, logits or the KV cache.
"""

from collections.abc import Iterator
from itertools import islice

from cluster.engine.sequence import Sequence, SequenceStatus
from cluster.engine.slot_bank import SlotBank
from cluster.errors import InvalidInput, Overloaded
from cluster.messages import AdapterRef

_MAX_OVERTAKEN = 64
"""A sequence whose adapters find no room beside those in use lets so many with other adapters pass. Then these wait
until there is room: otherwise a steady stream of one domain could keep another out for good."""


class Scheduler:
    """The queue of waiting sequences and the list of running ones, in the order of their rows."""

    def __init__(self, bank: SlotBank, max_running: int, max_waiting: int) -> None:
        self.running: list[Sequence] = []
        self.waiting: dict[str, Sequence] = {}
        self._bank = bank
        self._max_running = max_running
        self._max_waiting = max_waiting

    def enqueue(self, sequence: Sequence) -> None:
        """Put `sequence` at the end of the queue. Raises `Overloaded` when it is full, `InvalidInput` on a used id."""
        if len(self.waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting, which is the most; try again in a moment.")
        taken = sequence.request_id in self.waiting
        if taken or any(other.request_id == sequence.request_id for other in self.running):
            raise InvalidInput(f"The request id {sequence.request_id!r} is in use; expected a new one.")
        self.waiting[sequence.request_id] = sequence

    def admit(self) -> list[Sequence]:
        """Move the sequences that can start into `running`, pin their adapters, and return them."""
        admitted = list(islice(self._admissible(), self._max_running - len(self.running)))
        self._count_overtaken(admitted)
        for sequence in admitted:
            del self.waiting[sequence.request_id]
            self._bank.pin(sequence.refs)
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
        return admitted

    def can_admit(self) -> bool:
        """Whether `admit` would return a sequence."""
        return len(self.running) < self._max_running and next(self._admissible(), None) is not None

    def retire(self, sequence: Sequence) -> None:
        """Take `sequence` out of `running`: the last one moves into its place, as in the KV cache."""
        row = self.running.index(sequence)
        last = self.running.pop()
        if last is not sequence:
            self.running[row] = last
            last.row = row
        sequence.row = None
        self._bank.unpin(sequence.refs)

    def wanted(self) -> tuple[AdapterRef, ...]:
        """The adapters to fetch now, in the order of the queue: needed, not resident, and with room to come."""
        wanted = {ref: None for sequence in self._planned() for ref in sequence.mixture.refs}
        return tuple(ref for ref in wanted if ref not in self._bank.resident)

    def spared_for(self, ref: AdapterRef) -> set[AdapterRef]:
        """What may not be evicted for `ref`: the adapters of every sequence up to the first that needs it."""
        spared: set[AdapterRef] = set()
        for sequence in self._planned():
            spared |= sequence.refs
            if ref in sequence.refs:
                break
        return spared

    def _planned(self) -> Iterator[Sequence]:
        """The waiting sequences whose adapters fit together, beside those pinned; the earlier goes first."""
        planned = set(self._bank.pinned)
        used_bytes = self._bank.known_bytes(planned)
        for sequence in self.waiting.values():
            more = sequence.refs - planned
            more_bytes = self._bank.known_bytes(more)
            if used_bytes + more_bytes <= self._bank.budget_bytes:
                planned |= more
                used_bytes += more_bytes
                yield sequence

    def _admissible(self) -> Iterator[Sequence]:
        """The waiting sequences whose adapters are all resident, less those that must let a starved one go first."""
        starved: Sequence | None = None
        for sequence in self.waiting.values():
            if not self._bank.holds(sequence.refs):
                if starved is None and self._is_starved(sequence):
                    starved = sequence
            elif starved is None or sequence.refs <= starved.refs:
                yield sequence

    def _is_starved(self, sequence: Sequence) -> bool:
        return sequence.num_overtaken >= _MAX_OVERTAKEN and not self._bank.has_room(sequence.refs)

    def _count_overtaken(self, admitted: list[Sequence]) -> None:
        """Count, for each sequence that stays in the queue, the admitted ones with adapters that stood behind it."""
        leaving, behind = set(admitted), 0
        for sequence in reversed(self.waiting.values()):
            if sequence not in leaving:
                sequence.num_overtaken += behind
            elif sequence.refs:
                behind += 1
