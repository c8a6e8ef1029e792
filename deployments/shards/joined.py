"""One call under way for each key, however many ask for it. Knows nothing of what is called."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Joined(Generic[K, V]):
    """Makes each call once, and lets those who ask for the same while it is under way wait for the same result."""

    def __init__(self, call: Callable[[K], Coroutine[Any, Any, V]]) -> None:
        """`call` must not raise: nobody may be left to hear of it."""
        self._call = call
        self._under_way: dict[K, asyncio.Task[V]] = {}

    def ask(self, key: K) -> asyncio.Future[V]:
        """The result to come. Whoever leaves early, or cancels this, takes it from nobody else."""
        if (task := self._under_way.get(key)) is None:
            task = self._under_way[key] = asyncio.get_running_loop().create_task(self._call(key))
            task.add_done_callback(lambda _: self._under_way.pop(key))
        return asyncio.shield(task)
