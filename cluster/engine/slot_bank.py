"""The slot bank: adapters resident beside the base, within a budget of bytes.

Adapters of running sequences are pinned; of the others, the least recently used make room. Knows nothing of queues:
the scheduler says what to spare.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from itertools import takewhile
from typing import Generic, TypeVar

from cluster.errors import IncompatibleAdapter
from cluster.lora.weights import Resident
from cluster.messages import AdapterRef

R = TypeVar("R", bound=Resident)


class SlotBank(Generic[R]):
    """Resident adapters, least recently used first."""

    def __init__(self, budget_bytes: int, on_evict: Callable[[AdapterRef], None]) -> None:
        """`on_evict` frees whatever else holds a copy of an adapter that leaves."""
        self.budget_bytes = budget_bytes
        self.num_evictions = 0
        self.used_bytes = 0
        self.num_steps = 0
        """Steps begun: the clock that tells how long an adapter has been resident."""
        self._on_evict = on_evict
        self._resident: OrderedDict[AdapterRef, R] = OrderedDict()
        self._pins: Counter[AdapterRef] = Counter()
        self._sizes_bytes: dict[AdapterRef, int] = {}
        """Of every adapter ever seen, so that what left is asked for again only when it fits. One number each."""
        self._sum_of_sizes_bytes = 0
        self._loaded_at: dict[AdapterRef, int] = {}
        """The step at which each resident adapter came; the one resident longest first."""

    @property
    def resident(self) -> Mapping[AdapterRef, R]:
        return self._resident

    @property
    def pinned(self) -> frozenset[AdapterRef]:
        """The adapters of running sequences."""
        return frozenset(self._pins)

    def holds(self, refs: Iterable[AdapterRef]) -> bool:
        """Whether all of `refs` are resident."""
        return all(ref in self._resident for ref in refs)

    def known_bytes(self, refs: Iterable[AdapterRef]) -> int:
        """What `refs` take together; an adapter never seen counts as nothing."""
        return sum(self._sizes_bytes.get(ref, 0) for ref in refs)

    def likely_bytes(self, refs: Iterable[AdapterRef]) -> int:
        """What `refs` take together; an adapter never seen counts as the mean of those that were."""
        mean_bytes = self._sum_of_sizes_bytes // max(1, len(self._sizes_bytes))
        return sum(self._sizes_bytes.get(ref, mean_bytes) for ref in refs)

    def begin_step(self) -> None:
        """Count a step."""
        self.num_steps += 1

    def newer_than(self, num_steps: int) -> set[AdapterRef]:
        """The adapters that became resident less than `num_steps` steps ago."""
        newer = takewhile(lambda ref: self.num_steps - self._loaded_at[ref] < num_steps, reversed(self._loaded_at))
        return set(newer)

    def newest_beside(self, refs: Set[AdapterRef], among: Set[AdapterRef]) -> set[AdapterRef]:
        """`refs`, and of the resident ones `among` others as many as fit beside them: all loaded since some moment."""
        kept, used_bytes = set(refs), self.likely_bytes(refs)
        for ref in reversed(self._loaded_at):
            if ref in among and ref not in kept:
                used_bytes += self._sizes_bytes[ref]
                if used_bytes > self.budget_bytes:
                    break
                kept.add(ref)
        return kept

    def add(self, ref: AdapterRef, weights: R, spare: Collection[AdapterRef]) -> None:
        """Make `ref` resident, evicting what is neither pinned nor in `spare`, least recently used first.

        When that is not enough room, nothing is evicted and `ref` is not kept: it may be added again later. Raises
        `IncompatibleAdapter` for an adapter larger than the whole budget.
        """
        if ref in self._resident:
            return
        size_bytes = weights.num_bytes
        self._sum_of_sizes_bytes += size_bytes - self._sizes_bytes.get(ref, 0)
        self._sizes_bytes[ref] = size_bytes
        if size_bytes > self.budget_bytes:
            raise IncompatibleAdapter(
                f"The adapter {ref} has {size_bytes} bytes and the slot bank {self.budget_bytes}; "
                "raise adapter_bytes in the engine's settings."
            )
        excess_bytes = self.used_bytes + size_bytes - self.budget_bytes
        evicted: list[AdapterRef] = []
        for candidate in self._resident:
            if excess_bytes <= 0:
                break
            if candidate not in self._pins and candidate not in spare:
                evicted.append(candidate)
                excess_bytes -= self._sizes_bytes[candidate]
        if excess_bytes > 0:
            return
        for old in evicted:
            self._evict(old)
        self._resident[ref] = weights
        self._loaded_at[ref] = self.num_steps
        self.used_bytes += size_bytes

    def pin(self, refs: Iterable[AdapterRef]) -> None:
        """Keep `refs`, which are resident, until `unpin`; they are now the most recently used."""
        for ref in refs:
            self._resident.move_to_end(ref)
            self._pins[ref] += 1

    def unpin(self, refs: Iterable[AdapterRef]) -> None:
        """The counterpart of `pin`."""
        for ref in refs:
            self._pins[ref] -= 1
            if not self._pins[ref]:
                del self._pins[ref]

    def check_integrity(self, in_use: Counter[AdapterRef]) -> None:
        """Assert that exactly the adapters `in_use` are pinned, as often as used, resident, and the budget kept."""
        assert self._pins == in_use
        assert self.holds(in_use)
        assert self.used_bytes == sum(weights.num_bytes for weights in self._resident.values())
        assert self.used_bytes <= self.budget_bytes
        assert self._loaded_at.keys() == self._resident.keys()
        assert list(self._loaded_at.values()) == sorted(self._loaded_at.values())
        assert self._sum_of_sizes_bytes == sum(self._sizes_bytes.values())

    def _evict(self, ref: AdapterRef) -> None:
        self.used_bytes -= self._resident.pop(ref).num_bytes
        del self._loaded_at[ref]
        self.num_evictions += 1
        self._on_evict(ref)
