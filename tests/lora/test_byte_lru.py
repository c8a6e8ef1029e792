"""The budgeted store against a slow one: a list in the order of use, from which the first that may go is dropped."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.lora.byte_lru import ByteLru

BUDGET = 20
steps = st.lists(
    st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 24), st.sets(st.integers(0, 6))), max_size=40
)


@given(steps)
def test_it_keeps_what_a_list_in_order_of_use_would_keep(operations):
    lru, slow = ByteLru(BUDGET), []
    for is_put, key, size, spare in operations:
        if not is_put:
            found = lru.get(key)
            hit = next((entry for entry in slow if entry[0] == key), None)
            assert found == (None if hit is None else str(hit))
            slow = slow if hit is None else [entry for entry in slow if entry is not hit] + [hit]
            continue
        kept = lru.put(key, str((key, size)), size, spare)
        assert kept == put_slowly(slow, key, size, spare)
        assert lru.used_bytes == sum(size for _, size in slow) <= BUDGET
        assert list(lru) == [key for key, _ in slow]
        assert len(lru) == len(slow)


def put_slowly(slow, key, size, spare):
    if any(key == old for old, _ in slow):
        return True
    left = list(slow)
    while sum(size for _, size in left) + size > BUDGET:
        leaving = next((entry for entry in left if entry[0] not in spare), None)
        if leaving is None:
            return False
        left.remove(leaving)
    slow[:] = [*left, (key, size)]
    return True
