"""Races between copies, in virtual time: who is asked when, what comes back, and that nothing is left running."""

import asyncio
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.shards.hedging import Pace, race
from tests.serving.virtual_time import run

TIMEOUT_S, DELAY_S = 10.0, 1.0


class Copies:
    """Each answers `True` or `False` after its time; notes when it was asked and how many are still being asked."""

    def __init__(self, behaviours):
        self.behaviours = behaviours
        self.asked_s = {}
        self.num_open = 0

    async def ask(self, index):
        self.asked_s[index] = asyncio.get_running_loop().time()
        self.num_open += 1
        try:
            after_s, is_good = self.behaviours[index]
            await asyncio.sleep(after_s)
            return index, is_good
        finally:
            self.num_open -= 1


def raced(behaviours):
    copies = Copies(behaviours)

    async def scenario():
        asks = [partial(copies.ask, index) for index in range(len(behaviours))]
        outcome = await race(asks, lambda answer: answer[1], DELAY_S, TIMEOUT_S)
        return outcome, asyncio.get_running_loop().time()

    outcome, end_s = run(scenario())
    assert copies.num_open == 0
    return outcome, end_s, copies.asked_s


def replayed(behaviours):
    """The slow reference: the same rules, event by event. Who answered, when it ended, who was asked when."""
    asked, now = {}, 0.0
    while True:
        if len(asked) < len(behaviours):
            asked[len(asked)] = now
        ends = {i: asked[i] + behaviours[i][0] for i in asked if asked[i] + behaviours[i][0] > now}
        horizon = min(TIMEOUT_S, now + DELAY_S if len(asked) < len(behaviours) else TIMEOUT_S)
        first = min(ends, key=ends.__getitem__, default=None)
        if first is not None and ends[first] <= horizon:
            now = ends[first]
            if behaviours[first][1]:
                return first, now, asked
            if len(ends) == 1 and len(asked) == len(behaviours):
                return None, now, asked
        else:
            now = horizon
        if now >= TIMEOUT_S:
            return None, now, asked


# Odd fractions: no two events at the same moment, whose order would be anybody's guess.
times_s = st.lists(st.integers(1, 1200), min_size=1, max_size=5, unique=True)


@given(times_s, st.data())
def test_a_race_goes_as_its_rules_say(times, data):
    behaviours = [(time / 100 + 0.0007 * (index + 1), data.draw(st.booleans())) for index, time in enumerate(times)]
    outcome, end_s, asked_s = raced(behaviours)
    expected, expected_end_s, expected_asked_s = replayed(behaviours)
    assert (outcome.good and outcome.good[0]) == expected
    assert end_s == pytest.approx(expected_end_s)
    assert asked_s == pytest.approx(expected_asked_s)


def test_one_good_answer_in_time_is_all_that_is_asked_for():
    outcome, end_s, asked_s = raced([(0.5, True), (0.1, True)])
    assert (outcome.good, end_s, asked_s) == ((0, True), 0.5, {0: 0.0})


def test_a_slow_one_is_helped_out_and_a_bad_one_at_once():
    outcome, end_s, asked_s = raced([(1e9, True), (0.2, False), (0.3, True)])
    assert outcome.good == (2, True)
    assert outcome.bad == ((1, False),)
    assert asked_s == pytest.approx({0: 0.0, 1: 1.0, 2: 1.2})
    assert end_s == pytest.approx(1.5)


def test_the_pace_follows_the_95th_percentile_once_enough_is_known():
    pace = Pace()
    for _ in range(19):
        pace.note(5.0)
    assert pace.hedge_delay_s == 0.1
    for duration in range(300):
        pace.note(duration)
    last = sorted(range(300))[-256:]
    assert pace.hedge_delay_s == 1.5 * last[256 * 95 // 100]
    for _ in range(256):
        pace.note(1e-6)
    assert pace.hedge_delay_s == 0.01
