"""The catalog against a plain dictionary, under races, crashes and damage."""

import json
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random

import pytest

from cluster.errors import CatalogConflict, CorruptArtifact, InvalidInput, UnknownDomain
from cluster.lora.catalog import Catalog, CatalogState, CatalogWatcher, Change
from cluster.lora.store import write_version

DOMAINS = [f"domain-{index}" for index in range(8)]


class Model:
    """What a catalog should hold, kept the obvious way."""

    def __init__(self) -> None:
        self.base: int | None = None
        self.router: int | None = None
        self.adapters: dict[str, int] = {}

    def random_change(self, rng: Random) -> Change:
        """Draw a change, apply it here, and return it."""
        kind = rng.random()
        if kind < 0.05:
            self.base, self.adapters, self.router = rng.randint(1, 99), {}, None
            return Change(base=self.base)
        if kind < 0.2 and self.adapters:
            gone = tuple(rng.sample(sorted(self.adapters), rng.randint(1, len(self.adapters))))
            self.adapters = {name: version for name, version in self.adapters.items() if name not in gone}
            return Change(withdrawn=gone)
        if kind < 0.35:
            self.router = rng.randint(1, 99)
            return Change(router=self.router)
        chosen = {domain: rng.randint(1, 99) for domain in rng.sample(DOMAINS, rng.randint(1, 3))}
        self.adapters.update(chosen)
        return Change(adapters=chosen)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hundred_generations_hold_what_a_dictionary_holds(tmp_path: Path, seed: int) -> None:
    rng, model, catalog = Random(seed), Model(), Catalog(tmp_path)
    assert catalog.load() == CatalogState()
    for generation in range(1, 101):
        published = catalog.publish(model.random_change(rng))
        assert published == CatalogState(generation, model.base, model.adapters, model.router)
        assert Catalog(tmp_path).load() == published
    whole = [f.stem for f in tmp_path.glob("catalog/*.json") if "state" in json.loads(f.read_text())]
    assert sorted(whole, key=int) == ["32", "64", "96"]


def test_a_new_base_withdraws_what_belongs_to_the_old(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    catalog.publish(Change(base=1, adapters={"law": 1}, router=1))
    assert catalog.publish(Change(base=2)) == CatalogState(2, 2, {}, None)


def test_who_expected_another_generation_is_told_and_changes_nothing(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    seen = catalog.publish(Change(adapters={"law": 1}))
    catalog.publish(Change(adapters={"law": 2}), expected_generation=seen.generation)
    with pytest.raises(CatalogConflict, match="at generation 2, not 1"):
        catalog.publish(Change(adapters={"law": 3}), expected_generation=seen.generation)
    assert catalog.load() == CatalogState(2, None, {"law": 2}, None)


def _publish_fifty(root: Path, writer: int, start: Barrier) -> None:
    start.wait()
    for index in range(50):
        Catalog(root).publish(Change(adapters={f"writer-{writer}-{index}": index + 1}))


def test_four_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=_publish_fifty, args=(tmp_path, writer, start)) for writer in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    expected = {f"writer-{writer}-{index}": index + 1 for writer in range(4) for index in range(50)}
    assert Catalog(tmp_path).load() == CatalogState(200, None, expected, None)


def test_a_crash_between_artifact_and_catalog_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)

    def publish(text: str, crash: bool) -> None:
        def write(folder: Path) -> None:
            (folder / "weights").write_text(text)
            if crash:
                raise KeyboardInterrupt

        catalog.publish(Change(adapters={"law": write_version(tmp_path / "adapters" / "law", write)}))

    publish("first", crash=False)
    before = catalog.load()
    with pytest.raises(KeyboardInterrupt):
        publish("half", crash=True)
    # Killed just after the artifact: it lies there, complete, and is not current.
    write_version(tmp_path / "adapters" / "law", lambda folder: (folder / "weights").write_text("orphan"))
    assert catalog.load() == before == CatalogState(1, None, {"law": 1}, None)
    publish("second", crash=False)
    current = tmp_path / "adapters" / "law" / str(catalog.load().adapters["law"])
    assert (current / "weights").read_text() == "second"


def test_a_draft_left_by_a_killed_publisher_is_no_generation(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    state = catalog.publish(Change(adapters={"law": 1}))
    (tmp_path / "catalog" / ".draft-0123").write_text('{"change": {"ba')
    assert catalog.load() == state


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '"text"', "7", '{"change": {"router": 1}}', '{"change": 3}', "\x00\xff"]
)
def test_a_damaged_generation_is_refused_by_number_without_its_path(tmp_path: Path, content: str) -> None:
    catalog = Catalog(tmp_path)
    catalog.publish(Change(adapters={"law": 1}))
    (tmp_path / "catalog" / "1.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CorruptArtifact, match="Generation 1 ") as caught:
        catalog.load()
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_generation_is_refused(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    for version in range(1, 4):
        catalog.publish(Change(adapters={"law": version}))
    (tmp_path / "catalog" / "2.json").unlink()
    with pytest.raises(CorruptArtifact, match="Generation 2 ") as caught:
        catalog.load()
    assert str(tmp_path) not in str(caught.value)


def test_unknown_and_impossible_domains_are_refused(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    catalog.publish(Change(adapters={"law": 1, "math": 4}))
    with pytest.raises(UnknownDomain, match=r"'sql'; the domains are: law, math"):
        catalog.load().ref("sql")
    with pytest.raises(UnknownDomain, match="'sql'"):
        catalog.publish(Change(withdrawn=("sql",)))
    for name in ("", "none", "base", "zephyra", "../law", "Law", "a" * 64, "law\n"):
        with pytest.raises(InvalidInput, match="cannot name a domain"):
            catalog.publish(Change(adapters={name: 1}))
    assert catalog.latest() == 1


def test_the_watcher_tells_of_each_new_generation_once(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    told: list[CatalogState] = []
    watcher = CatalogWatcher(catalog, told.append)
    assert watcher.poll() == CatalogState()
    assert told == []
    catalog.publish(Change(adapters={"law": 1}))
    newest = catalog.publish(Change(adapters={"law": 2}))
    assert watcher.poll() == watcher.poll() == newest
    assert told == [newest]
