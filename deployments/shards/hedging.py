"""Asks one copy after another until one of them answers well. Knows nothing of what is asked, nor of Ray.

As in Dean and Barroso, "The tail at scale" (2013): the next copy is asked when the last one takes longer than nearly
all answers did, so that one slow shard costs a few asks more instead of everybody's time.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_REMEMBERED, _ENOUGH = 256, 20
"""Durations of so many answers are remembered; before there are so many, they say nothing."""

_FIRST_DELAY_S, _LEAST_DELAY_S = 0.1, 0.01
"""What is waited before there are enough, and at least: a delay below a call's own jitter would ask everyone twice."""


class Pace:
    """How long answers take, and so when to give up waiting for one."""

    def __init__(self) -> None:
        self._durations_s: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, duration_s: float) -> None:
        """An answer took so long."""
        self._durations_s.append(duration_s)

    @property
    def hedge_delay_s(self) -> float:
        """Half as much again as the 95th percentile of the last durations, so that equal ones stay below it."""
        if len(self._durations_s) < _ENOUGH:
            return _FIRST_DELAY_S
        ordered = sorted(self._durations_s)
        return max(_LEAST_DELAY_S, 1.5 * ordered[len(ordered) * 95 // 100])


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What a race gave."""

    good: T | None
    """The first good answer, if there was one."""
    bad: tuple[T, ...]
    """The answers before it that were not good."""


async def race(
    asks: Sequence[Callable[[], Awaitable[T]]],
    is_good: Callable[[T], bool],
    delay_s: float,
    timeout_s: float,
) -> Outcome[T]:
    """Start the first ask; start the next when one ended without a good answer, or none has come for `delay_s`.

    Ends with the first good answer, when all have ended, or after `timeout_s`; what is still under way is cancelled. An
    ask must not raise.
    """
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    left = deque(asks)
    running: set[asyncio.Task[T]] = set()
    bad: list[T] = []
    try:
        while True:
            if left:
                running.add(asyncio.ensure_future(_awaited(left.popleft())))
            wait_s = max(0.0, end_s - loop.time())
            done, running = await asyncio.wait(
                running, timeout=min(wait_s, delay_s) if left else wait_s, return_when=asyncio.FIRST_COMPLETED
            )
            for answer in [task.result() for task in done]:
                if is_good(answer):
                    return Outcome(answer, tuple(bad))
                bad.append(answer)
            if loop.time() >= end_s or not (left or running):
                return Outcome(None, tuple(bad))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _awaited(ask: Callable[[], Awaitable[T]]) -> T:
    return await ask()
