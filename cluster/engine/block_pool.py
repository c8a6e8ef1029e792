"""Which blocks of the KV cache are whose: reference counts, and full blocks found again by the prefix they hold.

A block is a place for the keys and values of BLOCK_TOKENS tokens in a row. Knows nothing of tensors or queues.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

BLOCK_TOKENS = 16
"""Tokens of one block."""

_KEY_BYTES = 16


def blocks_for(num_tokens: int) -> int:
    """How many blocks `num_tokens` tokens need."""
    return -(-num_tokens // BLOCK_TOKENS)


def root_key(salt: str) -> bytes:
    """The parent of a sequence's first block: `salt` says what else, beside the tokens, keys and values depend on."""
    return hashlib.blake2b(salt.encode(), digest_size=_KEY_BYTES).digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block with these tokens, behind the block, or root, that has the key `parent`."""
    assert len(token_ids) == BLOCK_TOKENS, "only full blocks have keys"
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


def chain_keys(salt: str, token_ids: Sequence[int]) -> list[bytes]:
    """One key for each full block of `token_ids`. Equal keys mean equal salt and equal tokens up to the block's end."""
    keys, parent = [], root_key(salt)
    for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
        parent = block_key(parent, token_ids[end - BLOCK_TOKENS : end])
        keys.append(parent)
    return keys


class BlockPool:
    """Blocks 0 to num_blocks - 1, each held by so many sequences as its reference count says; free at 0.

    A free block keeps what it holds, and can be found by its key, until it is handed out again. Blocks without a key
    are handed out first, then those that were freed longest ago.
    """

    def __init__(self, num_blocks: int, reuse_prefixes: bool) -> None:
        """Without `reuse_prefixes` no block is ever found by key."""
        self.num_blocks = num_blocks
        self.reuse_prefixes = reuse_prefixes
        self._counts = [0] * num_blocks
        self._blank = deque(range(num_blocks))
        """Free blocks without a key."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free blocks with a key, the one freed longest ago first."""
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """How many blocks `allocate` could hand out now."""
        return len(self._blank) + len(self._cached)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Hand out blocks to be written, each with one reference; None, and nothing changed, if too few are free."""
        if num_blocks > self.num_free:
            return None
        return [self._hand_out() for _ in range(num_blocks)]

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each of a sequence's blocks, which come in the order of their positions.

        The last is freed first, and so handed out first: a block is of no use when one before it is gone.
        """
        for block in reversed(blocks):
            assert self._counts[block] > 0, "a block is freed by who holds it"
            self._counts[block] -= 1
            if self._counts[block] > 0:
                continue
            if block in self._keys:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def find_prefix(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of known keys from the first on, with one more reference to each."""
        found: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            if self._counts[block] == 0:
                del self._cached[block]
            self._counts[block] += 1
            found.append(block)
        return found

    def register(self, block: int, key: bytes) -> None:
        """Let `block`, which is held and whose tokens have all been computed, be found by `key` from now on.

        Of several blocks with the same contents the first to be registered is the one that is found.
        """
        assert self._counts[block] > 0, "a block is registered by who holds it"
        if self.reuse_prefixes and key not in self._blocks and block not in self._keys:
            self._blocks[key] = block
            self._keys[block] = key

    def check_integrity(self, held: Iterable[list[int]]) -> None:
        """Assert that the blocks of `held`, one list for each sequence, are exactly those with references."""
        expected: Counter[int] = Counter()
        for blocks in held:
            assert len(set(blocks)) == len(blocks), "a sequence holds a block twice"
            expected.update(blocks)
        assert [expected[block] for block in range(self.num_blocks)] == self._counts
        free = [*self._blank, *self._cached]
        assert sorted(free) == [block for block, count in enumerate(self._counts) if count == 0]
        assert self._blocks == {key: block for block, key in self._keys.items()}
        assert len(self._blocks) == len(self._keys)
        assert self._cached.keys() <= self._keys.keys()
        assert not self._keys.keys() & set(self._blank)
        assert self.reuse_prefixes or not self._keys

    def check_contents(self, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """Assert that a sequence's full `blocks`, whose contents have these `keys`, are found by no others."""
        for block, key in zip(blocks, keys, strict=True):
            assert self._keys.get(block, key) == key, "a block is found by the key of other contents"

    def _hand_out(self) -> int:
        if self._blank:
            block = self._blank.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._blocks[self._keys.pop(block)]
        self._counts[block] = 1
        return block
