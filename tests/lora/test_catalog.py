"""The catalog against plain dictionaries, under races, crashes and damage, on a folder and in a bucket."""

import json
import multiprocessing
import threading
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random

import pytest

from cluster.errors import CatalogConflict, CorruptArtifact, InvalidInput, UnknownDomain
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, CatalogState, CatalogWatcher, Change
from cluster.lora.store import LocalStorage, Storage, write_version
from cluster.messages import AdapterRef

DOMAINS = [f"domain-{index}" for index in range(8)]


class Model:
    """What a catalog should hold, kept the obvious way."""

    def __init__(self) -> None:
        self.base: int | None = None
        self.router: int | None = None
        self.adapters: dict[str, int] = {}
        self.prototypes: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.tags: dict[str, dict[str, int]] = {}
        self.withdrawn: dict[str, int] = {}

    def state(self, generation: int) -> CatalogState:
        tags = {domain: dict(of_domain) for domain, of_domain in self.tags.items() if of_domain}
        return CatalogState(
            generation,
            self.base,
            dict(self.adapters),
            self.router,
            dict(self.prototypes),
            dict(self.aliases),
            tags,
            dict(self.withdrawn),
        )

    def random_change(self, rng: Random, generation: int) -> Change:
        """Draw a change, apply it here, and return it."""
        kind = rng.random()
        present = sorted(self.adapters)
        if kind < 0.05:
            for domain in present:
                self._withdraw(domain, generation)
            self.base, self.router = rng.randint(1, 99), None
            return Change(base=self.base)
        if kind < 0.2 and present:
            gone = tuple(rng.sample(present, rng.randint(1, len(present))))
            for domain in gone:
                self._withdraw(domain, generation)
            return Change(withdrawn=gone)
        if kind < 0.3:
            self.router = rng.randint(1, 99)
            return Change(router=self.router)
        if kind < 0.4 and present:
            alias, domain = f"alias-{rng.randint(0, 2)}", rng.choice(present)
            if rng.random() < 0.4 and alias in self.aliases:
                del self.aliases[alias]
                return Change(aliases={alias: None})
            self.aliases[alias] = domain
            return Change(aliases={alias: domain})
        if kind < 0.5 and present:
            domain, tag, version = rng.choice(present), rng.choice(["stable", "next"]), rng.randint(1, 99)
            if rng.random() < 0.4 and tag in self.tags.get(domain, {}):
                del self.tags[domain][tag]
                return Change(tags={domain: {tag: None}})
            self.tags.setdefault(domain, {})[tag] = version
            return Change(tags={domain: {tag: version}})
        chosen = {domain: rng.randint(1, 99) for domain in rng.sample(DOMAINS, rng.randint(1, 3))}
        prototypes = {domain: f"{rng.randint(0, 9)}" * 64 for domain in chosen if rng.random() < 0.5}
        for domain in chosen:
            self.prototypes.pop(domain, None)
            self.withdrawn.pop(domain, None)
        self.adapters.update(chosen)
        self.prototypes.update(prototypes)
        return Change(adapters=chosen, prototypes=prototypes)

    def _withdraw(self, domain: str, generation: int) -> None:
        del self.adapters[domain]
        self.prototypes.pop(domain, None)
        self.tags.pop(domain, None)
        self.aliases = {alias: named for alias, named in self.aliases.items() if named != domain}
        self.withdrawn[domain] = generation


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hundred_generations_hold_what_a_dictionary_holds(tmp_path: Path, seed: int) -> None:
    rng, model, catalog = Random(seed), Model(), Catalog(tmp_path)
    follower = CatalogWatcher(Catalog(tmp_path))
    assert catalog.load() == CatalogState()
    for generation in range(1, 101):
        published = catalog.publish(model.random_change(rng, generation))
        assert published == model.state(generation)
        assert Catalog(tmp_path).load() == published, "read from files alone"
        if rng.random() < 0.2:  # one that looks now and then applies several at once
            assert follower.poll() == published
    whole = [f.stem for f in tmp_path.glob("catalog/*.json") if "state" in json.loads(f.read_text())]
    assert sorted(whole, key=int) == ["32", "64", "96"]


def test_every_storage_holds_the_same(storage: Storage) -> None:
    rng, model, catalog = Random(2), Model(), Catalog(Store(storage))
    for generation in range(1, 41):
        catalog.publish(model.random_change(rng, generation))
    assert Catalog(Store(storage)).load() == model.state(40)


def test_a_new_base_withdraws_what_belongs_to_the_old(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    catalog.publish(Change(base=1, adapters={"law": 1}, router=1))
    assert catalog.publish(Change(base=2)) == CatalogState(2, 2, {}, None, withdrawn={"law": 2})


def test_who_expected_another_generation_is_told_and_changes_nothing(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    seen = catalog.publish(Change(adapters={"law": 1}))
    catalog.publish(Change(adapters={"law": 2}), expected_generation=seen.generation)
    with pytest.raises(CatalogConflict, match="at generation 2, not 1"):
        catalog.publish(Change(adapters={"law": 3}), expected_generation=seen.generation)
    assert Catalog(tmp_path).load() == CatalogState(2, None, {"law": 2}, None)


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


def test_publishers_of_every_storage_lose_nothing(storage: Storage) -> None:
    """In threads, each with a catalog of its own: a bucket's client does not survive a fork."""

    def publish(writer: int) -> None:
        catalog = Catalog(Store(storage))
        for index in range(6):
            catalog.publish(Change(adapters={f"writer-{writer}-{index}": index + 1}))

    threads = [threading.Thread(target=publish, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"writer-{writer}-{index}": index + 1 for writer in range(4) for index in range(6)}
    assert Catalog(Store(storage)).load() == CatalogState(24, None, expected, None)


def test_of_publishers_who_expect_the_same_generation_one_wins(storage: Storage) -> None:
    Catalog(Store(storage)).publish(Change(adapters={"law": 1}))
    won, told = [], []

    def publish(writer: int) -> None:
        try:
            Catalog(Store(storage)).publish(Change(adapters={"law": writer + 10}), expected_generation=1)
            won.append(writer + 10)
        except CatalogConflict as error:
            told.append(str(error))

    threads = [threading.Thread(target=publish, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(told)) == (1, 3)
    assert Catalog(Store(storage)).load().adapters == {"law": won[0]}


class CountingStorage(LocalStorage):
    """Counts what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()
        self.num_bytes_written = 0

    def read(self, name: str, max_bytes: int) -> bytes:
        self.asked["read"] += 1
        return super().read(name, max_bytes)

    def create(self, name: str, content: bytes) -> bool:
        self.num_bytes_written += len(content)
        return super().create(name, content)

    def exists(self, name: str) -> bool:
        self.asked["exists"] += 1
        return super().exists(name)

    def names(self, folder: str) -> list[str]:
        self.asked["names"] += 1
        return super().names(folder)


def test_what_a_look_costs_does_not_grow_with_the_history(tmp_path: Path) -> None:
    storage, publisher = CountingStorage(tmp_path), Catalog(tmp_path)
    for index in range(100):
        publisher.publish(Change(adapters={"law": index}))
    watcher = CatalogWatcher(Catalog(Store(storage)))
    assert storage.asked == {"names": 1, "read": 5}  # the snapshot 96 and the four after it
    storage.asked.clear()
    for _ in range(10):
        watcher.poll()
    assert storage.asked == {"exists": 10}
    publisher.publish(Change(adapters={"law": 100}))
    storage.asked.clear()
    assert watcher.poll().adapters == {"law": 100}
    assert storage.asked == {"exists": 3, "read": 1}


@pytest.mark.parametrize("behind", [*range(1, 20), 31, 32, 33, 63, 64, 65, 70])
def test_one_that_is_behind_finds_the_newest(tmp_path: Path, behind: int) -> None:
    catalog, late = Catalog(tmp_path), Catalog(tmp_path)
    late.publish(Change(adapters={"law": 0}))
    for index in range(1, behind + 1):
        newest = catalog.publish(Change(adapters={"law": index}))
    assert (late.latest(), late.load()) == (newest.generation, newest)


def test_what_is_written_does_not_grow_with_the_domains(tmp_path: Path) -> None:
    written = {}
    for num_domains in (10, 10_000):
        storage = CountingStorage(tmp_path / str(num_domains))
        catalog = Catalog(Store(storage))
        catalog.publish(Change(adapters={f"domain-{index:05}": 1 for index in range(num_domains)}))
        storage.num_bytes_written = 0
        for version in range(2, 31):
            catalog.publish(Change(adapters={"domain-00003": version}))
        written[num_domains] = storage.num_bytes_written
    assert written[10_000] == written[10] < 29 * 400


def test_names_of_domains_and_versions(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    catalog.publish(Change(adapters={"law": 3, "math": 1}))
    catalog.publish(Change(aliases={"legal": "law"}, tags={"law": {"stable": 2}}))
    state = Catalog(tmp_path).load()
    found = {
        name: str(state.resolve(name)) for name in ("law", "legal", "law@stable", "legal@stable", "law@1", "legal@1")
    }
    assert list(found.values()) == ["law@3", "law@3", "law@2", "law@2", "law@1", "law@1"]
    with pytest.raises(UnknownDomain, match=r"'law' has no tag 'next'; its tags are: stable"):
        state.resolve("law@next")
    with pytest.raises(InvalidInput, match="is not an adapter ref"):
        state.resolve("law@03")
    after = catalog.publish(Change(withdrawn=("law",)))
    assert (after.aliases, after.tags) == ({}, {})
    for name in ("law", "law@1", "law@stable"):
        with pytest.raises(UnknownDomain, match="'law' was withdrawn, in generation 3"):
            after.resolve(name)
    assert catalog.publish(Change(adapters={"law": 4})).resolve("law@1") == AdapterRef("law", 1), "it is back"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (Change(aliases={"math": "law"}), InvalidInput, "'math' is a domain"),
        (Change(aliases={"other": "sql"}), UnknownDomain, "no domain 'sql' for the alias"),
        (Change(aliases={"gone": None}), UnknownDomain, "no alias 'gone'"),
        (Change(aliases={"base": "law"}), InvalidInput, "cannot name a domain"),
        (Change(adapters={"legal": 1}), InvalidInput, "'legal' is an alias of 'law'"),
        (Change(withdrawn=("legal",)), InvalidInput, "'legal' is an alias of 'law'"),
        (Change(withdrawn=("sql",)), UnknownDomain, "no domain 'sql'"),
        (Change(tags={"law": {"3": 1}}), InvalidInput, "cannot be a tag"),
        (Change(tags={"sql": {"stable": 1}}), UnknownDomain, "no domain 'sql' to tag"),
        (Change(tags={"law": {"newest": None}}), UnknownDomain, "'law' has no tag 'newest' to take away"),
        (Change(prototypes={"law": "0" * 64}), InvalidInput, "publish both at once"),
    ],
)
def test_a_change_that_cannot_be_is_refused(tmp_path: Path, change: Change, error: type[Exception], said: str) -> None:
    catalog = Catalog(tmp_path)
    before = catalog.publish(Change(adapters={"law": 1, "math": 1}, aliases={"legal": "law"}))
    with pytest.raises(error, match=said):
        catalog.publish(change)
    assert Catalog(tmp_path).load() == before


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
        Catalog(tmp_path).load()
    assert str(tmp_path) not in str(caught.value)


def test_a_changed_digit_is_noticed(tmp_path: Path) -> None:
    Catalog(tmp_path).publish(Change(adapters={"law": 1}))
    file = tmp_path / "catalog" / "1.json"
    text = file.read_text()
    assert '"law": 1' in text
    file.write_text(text.replace('"law": 1', '"law": 2'))
    with pytest.raises(CorruptArtifact, match="is not what was published"):
        Catalog(tmp_path).load()


def test_a_missing_generation_is_refused(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    for version in range(1, 4):
        catalog.publish(Change(adapters={"law": version}))
    (tmp_path / "catalog" / "2.json").unlink()
    with pytest.raises(CorruptArtifact, match="Generation 2 ") as caught:
        Catalog(tmp_path).load()
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
