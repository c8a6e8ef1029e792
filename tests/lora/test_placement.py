"""Placement: every process agrees, shards are even, and a new shard takes its share from all and moves nothing else."""

import subprocess
import sys

import pytest

from cluster.lora.placement import shard_of
from cluster.messages import AdapterRef

REFS = [AdapterRef(f"domain-{index}", 1 + index % 7) for index in range(4000)]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 16])
def test_a_new_shard_takes_about_its_share_and_nothing_else_moves(num_shards: int) -> None:
    before, after = ([shard_of(ref, n) for ref in REFS] for n in (num_shards, num_shards + 1))
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {new for _, new in moved} == {num_shards}
    assert {old for old, _ in moved} == set(range(num_shards))
    share = 1 / (num_shards + 1)
    # Five standard deviations of a fair draw.
    assert abs(len(moved) / len(REFS) - share) < 5 * (share * (1 - share) / len(REFS)) ** 0.5


@pytest.mark.parametrize("num_shards", [2, 5, 16])
def test_shards_hold_about_as_much_as_one_another(num_shards: int) -> None:
    counts = [0] * num_shards
    for ref in REFS:
        counts[shard_of(ref, num_shards)] += 1
    fair = len(REFS) / num_shards
    assert all(abs(count - fair) < 5 * fair**0.5 for count in counts), counts


def test_another_process_computes_the_same_placement() -> None:
    code = (
        "from cluster.lora.placement import shard_of\nfrom cluster.messages import AdapterRef\n"
        "print([shard_of(AdapterRef(f'domain-{i}', 1 + i % 7), 5) for i in range(50)])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str([shard_of(ref, 5) for ref in REFS[:50]])
