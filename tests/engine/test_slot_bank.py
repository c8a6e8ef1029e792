"""The slot bank under random use: the budget holds, what is pinned or spared stays, the least recent goes first."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.slot_bank import SlotBank
from cluster.errors import IncompatibleAdapter
from cluster.messages import AdapterRef
from tests.engine.stepping import adapter_of, ref

REFS = [ref(name) for name in "abcdef"]


class EvictionLog:
    """Remembers what it was told to free."""

    def __init__(self) -> None:
        self.refs: list[AdapterRef] = []

    def __call__(self, evicted: AdapterRef) -> None:
        self.refs.append(evicted)


def test_the_least_recently_used_goes_first_and_only_as_many_as_needed():
    log = EvictionLog()
    bank = SlotBank(24, log)
    for name in "abc":
        bank.add(ref(name), adapter_of(1), spare=())
    bank.pin([ref("a")])
    bank.unpin([ref("a")])
    bank.add(ref("d"), adapter_of(1), spare=())
    assert log.refs == [ref("b")]
    bank.add(ref("e"), adapter_of(2), spare=())
    assert log.refs == [ref("b"), ref("c"), ref("a")]
    assert list(bank.resident) == [ref("d"), ref("e")]


def test_without_enough_room_nothing_is_evicted():
    log = EvictionLog()
    bank = SlotBank(24, log)
    for name in "abc":
        bank.add(ref(name), adapter_of(1), spare=())
    bank.pin([ref("a")])
    bank.add(ref("d"), adapter_of(2), spare=[ref("b")])
    assert (log.refs, list(bank.resident)) == ([], [ref("b"), ref("c"), ref("a")])


def test_an_adapter_beyond_the_whole_budget_is_refused():
    bank = SlotBank(24, EvictionLog())
    with pytest.raises(IncompatibleAdapter, match=r"a@1 has 32 bytes and the slot bank 24; raise adapter_bytes"):
        bank.add(ref("a"), adapter_of(4), spare=())
    assert not bank.resident


def test_an_adapter_never_seen_counts_as_the_mean_of_those_that_were():
    bank = SlotBank(80, EvictionLog())
    assert bank.likely_bytes([ref("a")]) == 0
    bank.add(ref("a"), adapter_of(1), spare=())
    bank.add(ref("b"), adapter_of(3), spare=())
    for _ in range(2):  # the second time it is seen for no more than once
        assert bank.likely_bytes([ref("a"), ref("b"), ref("c"), ref("d")]) == 8 + 24 + 16 + 16
        assert bank.known_bytes([ref("a"), ref("b"), ref("c"), ref("d")]) == 8 + 24
        bank.add(ref("b"), adapter_of(3), spare=())


def test_age_counts_from_the_last_load():
    bank = SlotBank(16, EvictionLog())
    for name in "abca":  # the third evicts a, the last b
        bank.add(ref(name), adapter_of(1), spare=())
        bank.begin_step()
        bank.pin([ref("c")] if bank.holds([ref("c")]) and not bank.pinned else [])
    assert [bank.newer_than(num_steps) for num_steps in (1, 2, 3)] == [set(), {ref("a")}, {ref("a"), ref("c")}]


def test_of_those_in_use_the_ones_that_came_last_are_kept_beside_a_newcomer():
    bank = SlotBank(48, EvictionLog())
    for name, num_units in (("a", 1), ("b", 2), ("c", 1), ("d", 1)):
        bank.add(ref(name), adapter_of(num_units), spare=())
    bank.add(ref("e"), adapter_of(2), spare=[ref(name) for name in "abcd"])  # its size is known from now on
    in_use = frozenset(ref(name) for name in "abc")
    # Beside e and f, of which nothing is known, c fits, and b no more; then a, which would fit, has to go before b.
    assert bank.newest_beside({ref("e"), ref("f")}, among=in_use) == {ref("e"), ref("f"), ref("c")}
    assert bank.newest_beside({ref("e")}, among=in_use) == {ref("e"), *in_use}


@settings(deadline=None, max_examples=100)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["add", "pin", "unpin"]), st.sampled_from(REFS), st.sets(st.sampled_from(REFS))),
        max_size=40,
    )
)
def test_random_use_keeps_the_books(operations):
    """A model in plain Python of what is resident and pinned, beside the bank."""
    log, resident, pins = EvictionLog(), set(), Counter()
    bank = SlotBank(48, log)
    for operation, target, spare in operations:
        before = len(log.refs)
        if operation == "add":
            bank.add(target, adapter_of(REFS.index(target) % 3 + 1), spare)
            evicted = log.refs[before:]
            assert not set(evicted) & (set(pins) | spare)
            assert set(evicted) <= resident
            assert not evicted or target in bank.resident
            resident = resident - set(evicted) | ({target} & bank.resident.keys())
        elif operation == "pin" and target in resident:
            bank.pin([target])
            pins[target] += 1
        elif operation == "unpin" and target in pins:
            bank.unpin([target])
            pins -= Counter([target])
        assert bank.resident.keys() == resident
        bank.check_integrity(pins)
