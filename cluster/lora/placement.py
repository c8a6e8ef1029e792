"""Which shard holds which adapter: rendezvous hashing, so that every process computes the same answer alone.

Going from S to S+1 shards moves 1/(S+1) of the adapters, and only onto the new shard (Thaler and Ravishankar 1998,
"Using name-based mappings to increase hit rates").
"""

import hashlib

from cluster.messages import AdapterRef


def shard_of(ref: AdapterRef, num_shards: int) -> int:
    """The index of the shard that holds `ref`: the one whose hash together with the ref is highest."""

    def score(shard: int) -> bytes:
        return hashlib.blake2b(f"{shard}:{ref}".encode(), digest_size=8).digest()

    return max(range(num_shards), key=score)
