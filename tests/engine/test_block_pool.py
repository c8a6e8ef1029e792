"""The block pool: keys that tell prefixes apart, blocks that are found while nobody needs them, exact books."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.block_pool import BLOCK_TOKENS, BlockPool, blocks_for, chain_keys

_tokens = st.lists(st.integers(0, 1), max_size=3 * BLOCK_TOKENS)


def test_blocks_for_counts_begun_blocks():
    for num_tokens in range(70):
        assert blocks_for(num_tokens) == len(range(0, num_tokens, BLOCK_TOKENS))


@settings(deadline=None, max_examples=200)
@given(first=_tokens, second=_tokens, salts=st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), cut=st.integers(0))
def test_keys_are_equal_exactly_where_salt_and_tokens_so_far_are(first, second, salts, cut):
    second = first[: cut % (len(first) + 1)] + second  # so that prefixes are often shared
    keys = [chain_keys(salt, tokens) for salt, tokens in zip(salts, (first, second), strict=True)]
    assert [len(found) for found in keys] == [len(first) // BLOCK_TOKENS, len(second) // BLOCK_TOKENS]
    for index, (one, other) in enumerate(zip(*keys, strict=False)):
        end = (index + 1) * BLOCK_TOKENS
        assert (one == other) == (salts[0] == salts[1] and first[:end] == second[:end])


def test_the_same_tokens_in_another_block_have_another_key():
    tokens = [7] * (2 * BLOCK_TOKENS)
    assert len(set(chain_keys("salt", tokens))) == 2


def test_too_few_free_blocks_give_none_and_change_nothing():
    pool = BlockPool(3, reuse_prefixes=True)
    held = pool.allocate(2)
    assert held == [0, 1]
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    pool.check_integrity([held])


def test_blocks_without_contents_go_first_then_those_freed_longest_ago_from_their_end():
    pool = BlockPool(5, reuse_prefixes=True)
    first, second = pool.allocate(2), pool.allocate(2)
    for blocks, salt in ((first, "first"), (second, "second")):
        for block, key in zip(blocks, chain_keys(salt, [0] * 32), strict=True):
            pool.register(block, key)
    pool.free(second)
    pool.free(first)
    assert pool.num_free == 5
    assert pool.allocate(5) == [4, *reversed(second), *reversed(first)]


def test_a_found_block_is_shared_and_free_only_when_all_have_freed_it():
    pool = BlockPool(2, reuse_prefixes=True)
    keys = chain_keys("salt", [0] * 32)
    held = pool.allocate(2)
    pool.register(held[0], keys[0])
    assert pool.find_prefix(keys) == held[:1]
    pool.free(held)
    pool.check_integrity([held[:1]])
    assert pool.num_free == 1
    pool.free(held[:1])
    assert pool.find_prefix(keys) == held[:1], "free blocks are found too"
    pool.free(held[:1])
    assert pool.allocate(2) is not None
    assert pool.find_prefix(keys) == [], "what was handed out may have been overwritten"


def test_a_prefix_is_found_from_its_beginning_only():
    pool = BlockPool(3, reuse_prefixes=True)
    keys = chain_keys("salt", [0] * 48)
    held = pool.allocate(3)
    pool.register(held[0], keys[0])
    pool.register(held[2], keys[2])
    assert pool.find_prefix(keys) == held[:1]
    assert pool.find_prefix(keys[1:]) == []


def test_of_two_blocks_with_the_same_contents_the_first_is_found():
    pool = BlockPool(2, reuse_prefixes=True)
    keys = chain_keys("salt", [0] * 16)
    held = pool.allocate(2)
    for block in held:
        pool.register(block, keys[0])
    pool.free(held)
    pool.check_integrity([])
    assert pool.find_prefix(keys) == [held[0]]


def test_without_reuse_nothing_is_found():
    pool = BlockPool(1, reuse_prefixes=False)
    keys = chain_keys("salt", [0] * 16)
    pool.register(pool.allocate(1)[0], keys[0])
    assert pool.find_prefix(keys) == []


def test_freeing_what_nobody_holds_is_noticed():
    pool = BlockPool(1, reuse_prefixes=True)
    with pytest.raises(AssertionError, match="freed by who holds it"):
        pool.free([0])


@settings(deadline=None, max_examples=100)
@given(data=st.data(), num_blocks=st.integers(1, 12))
def test_random_use_keeps_the_books_and_the_contents(data, num_blocks):
    """Beside the pool: what each block was last written with. A block that is found holds what its key says."""
    pool, contents, held = BlockPool(num_blocks, reuse_prefixes=True), {}, []
    for _ in range(data.draw(st.integers(1, 40))):
        if held and data.draw(st.booleans()):
            pool.free(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
            keys = chain_keys("salt", [token for token in tokens for _ in range(BLOCK_TOKENS)])
            found = pool.find_prefix(keys)
            assert [contents[block] for block in found] == keys[: len(found)]
            in_use = Counter(block for blocks in held for block in blocks)
            new = pool.allocate(len(keys) - len(found))
            if new is None:
                pool.free(found)
            else:
                assert not in_use.keys() & set(new)
                for block, key in zip(new, keys[len(found) :], strict=True):
                    contents[block] = key
                    pool.register(block, key)
                held.append(found + new)
        pool.check_integrity(held)
        assert pool.num_free == num_blocks - len({block for blocks in held for block in blocks})
