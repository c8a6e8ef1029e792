"""Keeps what was used last, within a budget of bytes. Knows nothing of what it keeps."""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteLru(Generic[K, V]):
    """Values by key, least recently used first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[K]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> V | None:
        """The value, which is now the most recently used; None if it is not kept."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: K, value: V, num_bytes: int, spare: Collection[K] = ()) -> bool:
        """Keep `value`, dropping what was used longest ago but for `spare`; False, and no change, if it cannot."""
        if key in self._kept:
            return True
        excess_bytes = self.used_bytes + num_bytes - self.budget_bytes
        dropped: list[K] = []
        for old, (_, old_bytes) in self._kept.items():
            if excess_bytes <= 0:
                break
            if old not in spare:
                dropped.append(old)
                excess_bytes -= old_bytes
        if excess_bytes > 0:
            return False
        for old in dropped:
            self.used_bytes -= self._kept.pop(old)[1]
        self._kept[key] = (value, num_bytes)
        self.used_bytes += num_bytes
        return True
