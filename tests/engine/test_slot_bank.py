"""The slot bank under random use: the budget holds, what is pinned or spared stays, the least recent goes first."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.slot_bank import SlotBank
from cluster.errors import IncompatibleAdapter
from cluster.lora.weights import AdapterWeights, Factors
from cluster.messages import AdapterRef
from tests.engine.systems import ref

REFS = [ref(name) for name in "abcdef"]


def weights_of(num_units: int) -> AdapterWeights:
    """An adapter of 8 bytes a unit."""
    return AdapterWeights({"layer": Factors(torch.ones(num_units, 1), torch.ones(1, num_units), 1.0)}, "base")


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
        bank.add(ref(name), weights_of(1), spare=())
    bank.pin([ref("a")])
    bank.unpin([ref("a")])
    bank.add(ref("d"), weights_of(1), spare=())
    assert log.refs == [ref("b")]
    bank.add(ref("e"), weights_of(2), spare=())
    assert log.refs == [ref("b"), ref("c"), ref("a")]
    assert list(bank.resident) == [ref("d"), ref("e")]


def test_without_enough_room_nothing_is_evicted():
    log = EvictionLog()
    bank = SlotBank(24, log)
    for name in "abc":
        bank.add(ref(name), weights_of(1), spare=())
    bank.pin([ref("a")])
    bank.add(ref("d"), weights_of(2), spare=[ref("b")])
    assert (log.refs, list(bank.resident)) == ([], [ref("b"), ref("c"), ref("a")])
    assert not bank.has_room([ref("d"), ref("b")])
    assert bank.has_room([ref("d")])


def test_an_adapter_beyond_the_whole_budget_is_refused():
    bank = SlotBank(24, EvictionLog())
    with pytest.raises(IncompatibleAdapter, match=r"a@1 has 32 bytes and the slot bank 24; raise adapter_bytes"):
        bank.add(ref("a"), weights_of(4), spare=())
    assert not bank.resident


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
            bank.add(target, weights_of(REFS.index(target) % 3 + 1), spare)
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
