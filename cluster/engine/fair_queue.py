"""The waiting sequences, and whose turn it is: lower priority numbers first; among equals, fair between domains.

Fair as in VTC (arXiv 2401.00588): of the mixtures that wait, the one that was served the fewest tokens goes first, and
one that comes anew starts level with the others. Knows nothing of adapters, blocks or the batch.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cluster.engine.sequence import Sequence
from cluster.messages import AdapterRef


@dataclass(eq=False, slots=True)
class Account:
    """What the sequences of one mixture have had. It lives while one of them waits or runs."""

    served_tokens: int = 0
    """Prompt tokens of those admitted, and tokens generated; raised to the others' level when it comes anew."""
    num_running: int = 0
    num_lanes: int = 0
    """Priorities at which it waits."""


@dataclass(eq=False, slots=True)
class Lane:
    """The waiting sequences of one mixture and one priority, the next first."""

    key: str
    priority: int
    refs: frozenset[AdapterRef]
    account: Account
    since_step: int
    """The step in which it last had its turn, or came to wait."""
    sequences: OrderedDict[str, Sequence] = field(default_factory=OrderedDict)
    """By request id."""

    @property
    def rank(self) -> tuple[int, int, int]:
        """The lane of the lowest rank is next; no two are equal."""
        return self.priority, self.account.served_tokens, self.head.arrival

    @property
    def head(self) -> Sequence:
        return next(iter(self.sequences.values()))


class FairQueue:
    """Lanes of waiting sequences, and the accounts of the mixtures that wait or run."""

    def __init__(self) -> None:
        self._waiting: dict[str, Sequence] = {}
        self._accounts: dict[str, Account] = {}
        self._lanes: dict[int, OrderedDict[str, Lane]] = {}
        """By priority, then by mixture; the one that has waited longest for its turn first."""

    @property
    def waiting(self) -> Mapping[str, Sequence]:
        """All waiting sequences by request id."""
        return self._waiting

    def push(self, sequence: Sequence, step: int) -> None:
        """Put `sequence` at the end of its lane; `step` is the number of the step at hand."""
        self._lane_for(sequence, step).sequences[sequence.request_id] = sequence
        self._waiting[sequence.request_id] = sequence

    def push_front(self, sequence: Sequence, step: int) -> None:
        """Put `sequence` before all others of its lane."""
        self.push(sequence, step)
        self._lane_for(sequence, step).sequences.move_to_end(sequence.request_id, last=False)

    def remove(self, request_id: str) -> Sequence:
        """Take out a waiting sequence that will not run."""
        sequence = self._waiting.pop(request_id)
        lanes = self._lanes[sequence.priority]
        lane = lanes[sequence.mixture.key]
        del lane.sequences[request_id]
        if not lane.sequences:
            del lanes[lane.key]
            lane.account.num_lanes -= 1
            self._close_unused(lane.key)
        if not lanes:
            del self._lanes[sequence.priority]
        return sequence

    def start(self, sequence: Sequence, step: int) -> None:
        """Take out a waiting sequence to run: its lane has had its turn."""
        key = sequence.mixture.key
        self._accounts[key].num_running += 1
        lanes = self._lanes[sequence.priority]
        lanes[key].since_step = step
        lanes.move_to_end(key)
        self.remove(sequence.request_id)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens that a running sequence was served."""
        self._accounts[sequence.mixture.key].served_tokens += num_tokens

    def end(self, sequence: Sequence) -> None:
        """A sequence that was started runs no more."""
        key = sequence.mixture.key
        self._accounts[key].num_running -= 1
        self._close_unused(key)

    def lanes(self) -> list[Lane]:
        """All lanes, the next first."""
        return [
            lane
            for _, lanes in sorted(self._lanes.items())
            for lane in sorted(lanes.values(), key=lambda lane: (lane.account.served_tokens, lane.head.arrival))
        ]

    def turns(self, lanes: Iterable[Lane]) -> Iterator[Sequence]:
        """The sequences of `lanes`, in turn. The caller starts and charges each before it takes the next."""
        heap = [(lane.rank, lane) for lane in lanes]
        heapq.heapify(heap)
        while heap:
            rank, lane = heapq.heappop(heap)
            if rank == lane.rank:
                yield lane.head
            if lane.sequences:
                heapq.heappush(heap, (lane.rank, lane))

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Assert that lanes and accounts are exactly those of the waiting and the `running` sequences."""
        lanes = [(priority, key, lane) for priority, found in self._lanes.items() for key, lane in found.items()]
        assert all(self._lanes.values()), "a priority at which nobody waits"
        for priority, key, lane in lanes:
            assert lane.sequences, "a lane in which nobody waits"
            assert (lane.priority, lane.key, lane.account) == (priority, key, self._accounts[key])
            for request_id, sequence in lane.sequences.items():
                assert (sequence.request_id, sequence.priority, sequence.mixture.key) == (request_id, priority, key)
                assert self._waiting[request_id] is sequence
        for found in self._lanes.values():
            steps = [lane.since_step for lane in found.values()]
            assert steps == sorted(steps), "the one that has waited longest for its turn is not the first"
        assert sum(len(lane.sequences) for _, _, lane in lanes) == len(self._waiting)
        num_running = Counter(sequence.mixture.key for sequence in running)
        num_lanes = Counter(key for _, key, _ in lanes)
        assert self._accounts.keys() == num_running.keys() | num_lanes.keys()
        for key, account in self._accounts.items():
            assert (account.num_running, account.num_lanes) == (num_running[key], num_lanes[key])

    def _lane_for(self, sequence: Sequence, step: int) -> Lane:
        """The lane of `sequence`, made if there is none."""
        key, priority = sequence.mixture.key, sequence.priority
        lanes = self._lanes.setdefault(priority, OrderedDict())
        if (lane := lanes.get(key)) is None:
            level = self._level(lanes)
            account = self._accounts.setdefault(key, Account())
            account.served_tokens = max(account.served_tokens, level)
            account.num_lanes += 1
            lane = lanes[key] = Lane(key, priority, sequence.refs, account, step)
        return lane

    def _level(self, lanes: Mapping[str, Lane]) -> int:
        """Where a mixture that comes to wait beside `lanes` starts: behind the lane that waits longest for its turn.

        So however many mixtures come, each new, none of those that wait is held up by more than those before it. If
        nobody waits, nobody has a claim from before: it starts level with the one served most.
        """
        if lanes:
            return next(iter(lanes.values())).account.served_tokens
        return max((account.served_tokens for account in self._accounts.values()), default=0)

    def _close_unused(self, key: str) -> None:
        account = self._accounts[key]
        if not account.num_running and not account.num_lanes:
            del self._accounts[key]
