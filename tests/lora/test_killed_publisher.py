"""A publisher killed at each of its steps on the disk: the catalog is the old one or the new one, and goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.killed_publisher import Kills, kill_at_each_step, prepare, publish_law, torn, withdraw_law
from cluster.lora.catalog import CatalogState
from cluster.lora.store import LocalStorage


@pytest.mark.parametrize("publish", [publish_law, withdraw_law])
@pytest.mark.parametrize("generations_before", [31])
def test_a_kill_at_any_step_leaves_the_old_state_or_the_new(
    tmp_path: Path, generations_before: int, publish: Callable[[Path], CatalogState]
) -> None:
    prepare(tmp_path, generations_before)
    kills = Kills()
    kill_at_each_step(tmp_path, publish, kills)
    assert kills.torn == 0
    assert kills.old > (20 if publish is publish_law else 4), "the steps were meant to be many"
    assert kills.new >= 1, "the last steps come after the generation is there"


def test_the_benchmark_counts_and_finds_what_is_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torn(1)["torn_catalogs"].value == 0

    def create_in_place(self: LocalStorage, name: str, content: bytes) -> bool:
        """What must not be done: a name that is there before its content is."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.write_bytes(content)
        return True

    monkeypatch.setattr(LocalStorage, "create", create_in_place)
    figures = torn(1)
    assert figures["torn_catalogs"].value > 0
    assert figures["kills"].value >= 20
