"""Which shards hold which adapter: rendezvous hashing, so that every process computes the same answer alone.

Going from S to S+1 shards moves 1/(S+1) of the copies, and only onto the new shard (Thaler and Ravishankar 1998,
"Using name-based mappings to increase hit rates").
"""

import hashlib
from collections.abc import Iterable
from typing import TypeVar

from cluster.messages import AdapterRef

P = TypeVar("P")


def ranked(key: str, places: Iterable[P]) -> list[P]:
    """`places`, the one whose hash together with `key` is highest first. `str` must tell them apart."""
    return sorted(
        places, key=lambda place: hashlib.blake2b(f"{place}:{key}".encode(), digest_size=8).digest(), reverse=True
    )


def owners_of(ref: AdapterRef, num_shards: int, copies: int = 1) -> tuple[int, ...]:
    """The indices of the shards that hold `ref`, as many as it has copies or there are; the first is asked first.

    One copy more adds a shard at the end and changes nothing else.
    """
    return tuple(ranked(str(ref), range(num_shards))[:copies])


def shard_of(ref: AdapterRef, num_shards: int) -> int:
    """The first shard that holds `ref`."""
    return owners_of(ref, num_shards)[0]
