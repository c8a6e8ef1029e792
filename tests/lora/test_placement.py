"""Placement: every process agrees, shards are even, and a new shard takes its share from all and moves nothing else."""

import subprocess
import sys

import pytest

from cluster.lora.placement import owners_of, shard_of
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


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("num_shards", [1, 2, 5, 16])
def test_copies_lie_on_as_many_shards_and_a_new_shard_takes_its_share_of_them(num_shards: int, copies: int) -> None:
    before, after = ([owners_of(ref, n, copies) for ref in REFS] for n in (num_shards, num_shards + 1))
    moved = 0
    for old, new in zip(before, after, strict=True):
        assert len(set(old)) == len(old) == min(copies, num_shards)
        gained = set(new) - set(old)
        assert gained <= {num_shards}, "only onto the new shard"
        assert [shard for shard in new if shard in old] == [shard for shard in old if shard in new], "the order stays"
        moved += len(gained)
    # Each adapter has a copy on the new shard with this probability.
    share = min(1.0, copies / (num_shards + 1))
    assert abs(moved / len(REFS) - share) <= 5 * (share * (1 - share) / len(REFS)) ** 0.5


def test_one_copy_more_leaves_the_others_where_they_are() -> None:
    for ref in REFS[:200]:
        assert shard_of(ref, 7) == owners_of(ref, 7)[0]
        for copies in range(1, 9):
            assert owners_of(ref, 7, copies + 1)[:copies] == owners_of(ref, 7, copies)


@pytest.mark.parametrize(("num_shards", "copies"), [(5, 2), (16, 3)])
def test_second_and_third_copies_are_spread_as_evenly_as_the_first(num_shards: int, copies: int) -> None:
    """Otherwise one shard's death would fall on one other."""
    for away in range(num_shards):
        owners = [owners_of(ref, num_shards, copies) for ref in REFS]
        heirs = [second for first, second, *_ in owners if first == away]
        fair = len(heirs) / (num_shards - 1)
        assert all(abs(heirs.count(o) - fair) < 5 * fair**0.5 for o in range(num_shards) if o != away)
