"""Which adapters are to be resident: who may start with those that are, what to fetch, and what may not leave.

Whose turn it is decides, as far as the slot bank's room allows. A sequence whose adapters are on their way holds up
nobody; one whose adapters find no room makes those in use that came first run dry. Knows nothing of tokens or blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cluster.engine.fair_queue import Lane
from cluster.engine.slot_bank import SlotBank
from cluster.messages import AdapterRef

PATIENCE_STEPS = 128
"""For so many steps after an adapter was loaded it keeps its place while sequences wait for it: what has gathered for
it is served before it leaves, or the bank would mostly load and evict. And for so many steps sequences that find no
room wait for adapters in use to fall free by themselves, before any of these is denied to others."""


@dataclass(frozen=True, slots=True)
class Loading:
    """What the slot bank is to fetch for the lanes that wait."""

    refs: tuple[AdapterRef, ...]
    """Not resident, and there is room, or room can be made; in turn."""
    held: set[AdapterRef]
    """What may not be evicted for any other: these, the adapters in use, and those of the lanes before them."""


def admissible(lanes: Sequence[Lane], bank: SlotBank[Any]) -> Iterator[Lane]:
    """Those of `lanes`, which come in turn, whose sequences may start now. All their adapters are resident.

    Beside the adapters in use and those just loaded, the bank's room goes to the lanes in turn. Behind the first that
    finds none, none takes new room. When its patience is at an end, of the adapters in use only those that were loaded
    last, as many as fit beside it, go on serving others. So, once it is the first, it has its room after
    PATIENCE_STEPS and the longest of what runs by then, whatever comes behind it.
    """
    room = _Room(bank, lanes)
    return (lane for lane in lanes if room.judge(lane) is _Verdict.START)


def loading(lanes: Sequence[Lane], bank: SlotBank[Any]) -> Loading:
    """What to fetch for `lanes`, which come in turn: for those that the rules of `admissible` give room to load."""
    room = _Room(bank, lanes)
    refs: dict[AdapterRef, None] = {}
    for lane in lanes:
        if room.judge(lane) is _Verdict.LOAD:
            refs |= dict.fromkeys(sorted(lane.refs))
        elif room.is_closed:
            break
    return Loading(tuple(ref for ref in refs if ref not in bank.resident), room.held)


class _Verdict(Enum):
    START = "start"
    LOAD = "load"
    WAIT = "wait"


class _Room:
    """What is left of the bank beside the adapters held so far."""

    def __init__(self, bank: SlotBank[Any], lanes: Sequence[Lane]) -> None:
        new = bank.newer_than(PATIENCE_STEPS)
        tenured = [lane for lane in lanes if not new.isdisjoint(lane.refs) and bank.holds(lane.refs)] if new else []
        self._tenured = set(tenured)
        self.held: set[AdapterRef] = set(bank.pinned.union(*(lane.refs for lane in tenured)))
        self.is_closed = False
        """A lane found no room: nothing more is to be loaded."""
        self._bank = bank
        self._held_bytes = bank.likely_bytes(self.held)
        self._kept: set[AdapterRef] | None = None
        """All that others may go on using, once that lane's patience is at an end."""

    def judge(self, lane: Lane) -> _Verdict:
        """Say what the next lane may do, and keep room for it."""
        if lane in self._tenured:
            return _Verdict.START
        is_resident = self._bank.holds(lane.refs)
        if not is_resident and self.is_closed:
            return _Verdict.WAIT
        more_bytes = self._bank.likely_bytes(lane.refs - self.held)
        # Beside nothing else there is always room: what cannot be is refused elsewhere, once the sizes are known.
        if self._held_bytes + more_bytes > self._bank.budget_bytes and not self.held <= lane.refs:
            self._close(lane)
            return _Verdict.WAIT
        if is_resident and self._kept is not None and not lane.refs <= self._kept:
            return _Verdict.WAIT
        self.held |= lane.refs
        self._held_bytes += more_bytes
        return _Verdict.START if is_resident else _Verdict.LOAD

    def _close(self, lane: Lane) -> None:
        """`lane` finds no room; the first such lane comes before all that follow."""
        if not self.is_closed and self._bank.num_steps - lane.since_step >= PATIENCE_STEPS:
            self._kept = self._bank.newest_beside(lane.refs, among=self.held)
        self.is_closed = True
