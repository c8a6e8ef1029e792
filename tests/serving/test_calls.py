"""Calls between deployments: what a timeout, a death or an early end does to callee and caller."""

import asyncio
from contextlib import aclosing

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from cluster.errors import AdapterUnavailable, PromptTooLong, UnknownDomain
from deployments import calls
from tests.serving.local import GoneHandle, LocalHandle

pytestmark = pytest.mark.anyio


class Callee:
    """Counts what it is asked, and fails as told."""

    def __init__(self, failures: list[Exception] | None = None) -> None:
        self.failures = failures or []
        self.num_calls = 0
        self.num_closed = 0

    async def double(self, number):
        self.num_calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return 2 * number

    async def count(self, stop):
        try:
            for number in range(stop):
                await asyncio.sleep(0)
                yield number
            if self.failures:
                yield self.failures.pop(0)
        finally:
            self.num_closed += 1


class DyingHandle(LocalHandle):
    """Its deployment dies `num_deaths` times before it answers."""

    def __init__(self, target, num_deaths):
        super().__init__(target, "double")
        self.num_deaths = num_deaths

    def remote(self, *args):
        if self.num_deaths > 0:
            self.num_deaths -= 1
            future = asyncio.get_running_loop().create_future()
            future.set_exception(ActorUnavailableError("gone", b"x" * 16))
            return future
        return super().remote(*args)


LOST = AdapterUnavailable("The callee is gone.")


async def test_a_call_gives_the_result():
    double = calls.method(LocalHandle(Callee()), "double")
    assert await calls.call(double, 21, timeout_s=5, lost=LOST) == 42


async def test_a_call_raises_what_the_callee_raised_and_does_not_repeat_it():
    callee = Callee([UnknownDomain("no such domain")])
    with pytest.raises(UnknownDomain, match="no such domain"):
        await calls.read(calls.method(LocalHandle(callee), "double"), 1, timeout_s=5, lost=LOST)
    assert callee.num_calls == 1


async def test_a_callee_that_never_answers_is_lost_and_the_call_is_cancelled():
    gone = GoneHandle()
    with pytest.raises(AdapterUnavailable):
        await calls.call(gone, timeout_s=0.05, lost=LOST)
    assert gone.num_open == 0


async def test_a_caller_that_is_cancelled_cancels_its_call():
    gone = GoneHandle()
    task = asyncio.ensure_future(calls.call(gone, timeout_s=60, lost=LOST))
    await asyncio.sleep(0.01)
    assert gone.num_open == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone.num_open == 0


async def test_a_read_is_asked_again_when_its_callee_died():
    callee = Callee()
    assert await calls.read(DyingHandle(callee, num_deaths=2), 4, timeout_s=5, lost=LOST) == 8
    with pytest.raises(AdapterUnavailable):
        await calls.call(DyingHandle(callee, num_deaths=1), 4, timeout_s=5, lost=LOST)


async def test_a_read_gives_up_when_its_time_is_over():
    with pytest.raises(AdapterUnavailable):
        await calls.read(DyingHandle(Callee(), num_deaths=10**6), 4, timeout_s=0.2, lost=LOST)


async def test_rays_dressing_of_an_error_is_taken_off():
    """Its text would carry the traceback to the client."""
    dressed = RayTaskError("double", "Traceback (most recent call last): ...", PromptTooLong("too long"))
    callee = Callee([dressed.as_instanceof_cause()])
    with pytest.raises(PromptTooLong) as caught:
        await calls.call(calls.method(LocalHandle(callee), "double"), 1, timeout_s=5, lost=LOST)
    assert type(caught.value) is PromptTooLong
    assert str(caught.value) == "too long"


async def test_a_stream_gives_its_items():
    count = calls.method(LocalHandle(Callee()), "count", stream=True)
    assert [item async for item in calls.stream(count, 5, lost=LOST)] == list(range(5))


async def test_a_stream_that_is_closed_early_closes_the_callee():
    callee = Callee()
    count = calls.method(LocalHandle(callee), "count", stream=True)
    async with aclosing(calls.stream(count, 10**9, lost=LOST)) as numbers:
        assert [await anext(numbers) for _ in range(3)] == [0, 1, 2]
    await asyncio.sleep(0.05)
    assert callee.num_closed == 1


async def test_an_error_among_the_items_is_raised():
    count = calls.method(LocalHandle(Callee([PromptTooLong("too long")])), "count", stream=True)
    numbers = calls.stream(count, 2, lost=LOST)
    assert [await anext(numbers), await anext(numbers)] == [0, 1]
    with pytest.raises(PromptTooLong):
        await anext(numbers)


async def test_an_item_that_does_not_come_is_a_loss():
    gone = GoneHandle()
    with pytest.raises(AdapterUnavailable):
        await anext(calls.stream(gone, lost=LOST, item_timeout_s=0.05))
    assert gone.num_open == 0


async def test_merged_streams_hold_all_items_each_in_its_own_order():
    count = calls.method(LocalHandle(Callee()), "count", stream=True)
    merged = [item async for item in calls.merge([calls.stream(count, n, lost=LOST) for n in (3, 0, 5)])]
    assert sorted(merged) == sorted([*range(3), *range(5)])


async def test_merging_raises_what_one_stream_raised():
    good, bad = Callee(), Callee([PromptTooLong("too long")])
    streams = [calls.stream(calls.method(LocalHandle(c), "count", stream=True), 2, lost=LOST) for c in (good, bad)]
    with pytest.raises(PromptTooLong):
        [item async for item in calls.merge(streams)]


async def test_closing_a_merge_closes_every_stream():
    callee = Callee()
    count = calls.method(LocalHandle(callee), "count", stream=True)
    async with aclosing(calls.merge([calls.stream(count, 10**9, lost=LOST) for _ in range(3)])) as merged:
        await anext(merged)
    await asyncio.sleep(0.05)
    assert callee.num_closed == 3
