"""Prototypes in files of their own: the router made of many is the one that adding domains one by one makes."""

import random
from pathlib import Path

import pytest
import torch

from cluster.errors import CorruptArtifact
from cluster.lora.artifacts import Store
from cluster.lora.catalog_state import CatalogState
from cluster.messages import AdapterRef
from cluster.router.assembly import RouterAssembly
from cluster.router.domain_prototypes import (
    PROTOTYPES_FILE,
    DomainPrototypes,
    prototypes_from_examples,
    with_prototypes,
)
from cluster.router.examples import EXAMPLES_FILE, Examples
from cluster.router.scoring import FixedPrototypes
from cluster.router.tiny_ada import TinyAda
from tests.router.prompts import DOMAINS, STRANGE, prompts
from tests.router.test_tiny_ada import NEW_TAX, TAX

ASTRONOMY = ("How far is the moon from the earth?", "Name the planets with rings", "What is a black hole made of?")
TEXTS = (*prompts("val", 6)[0], *STRANGE, *NEW_TAX, *ASTRONOMY)


def same(one: TinyAda, other: TinyAda) -> bool:
    return (one.domains, one.data_free) == (other.domains, other.data_free) and torch.equal(
        one.logits(TEXTS), other.logits(TEXTS)
    )


def test_all_at_once_is_one_by_one(ada: TinyAda) -> None:
    before = ada.logits(TEXTS)
    given = {
        "tax": prototypes_from_examples(ada, 1, "tax", TAX),
        "astronomy": prototypes_from_examples(ada, 1, "astronomy", ASTRONOMY, is_data_free=True),
    }
    expected = ada.with_domain("tax", TAX).with_domain("astronomy", ASTRONOMY, is_data_free=True).without_domain("sql")
    made = with_prototypes(ada, given, {"sql", "never known"})
    assert same(made, expected)
    assert made.data_free == {"astronomy"}
    assert torch.equal(ada.logits(TEXTS), before), "the router it was made of is as it was"
    assert same(with_prototypes(made, {}, set(given)), ada.without_domain("sql"))
    assert with_prototypes(ada, {}, set(DOMAINS)).domains == ()


def test_rows_of_its_own_take_the_place_of_trained_ones(ada: TinyAda) -> None:
    given = {"sql": prototypes_from_examples(ada, 1, "sql", TAX)}
    assert same(with_prototypes(ada, given, set()), ada.without_domain("sql").with_domain("sql", TAX))


def test_a_file_holds_every_bit(ada: TinyAda) -> None:
    given = prototypes_from_examples(ada, 7, "tax", TAX, is_data_free=True)
    read = DomainPrototypes.from_bytes(given.to_bytes())
    assert torch.equal(read.rows_PV, given.rows_PV)
    assert (read.offset, read.router, read.is_data_free) == (given.offset, 7, True)
    assert same(with_prototypes(ada, {"tax": read}, set()), with_prototypes(ada, {"tax": given}, set()))


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "NaN", "long", "infinite offset", "integers", "one number", "no header"]
)
def test_a_damaged_file_is_refused(ada: TinyAda, damage: str) -> None:
    import safetensors.torch

    good = prototypes_from_examples(ada, 1, "tax", TAX)
    rows, offset, header = (
        good.rows_PV,
        torch.tensor(good.offset),
        {"zephyra": '{"format": 1, "router": 1, "data_free": false}'},
    )
    content = {
        "empty": lambda: b"",
        "cut": lambda: good.to_bytes()[:-1],
        "long": lambda: safetensors.torch.save({"rows": rows * 1.2, "offset": offset}, header),
        "NaN": lambda: safetensors.torch.save({"rows": rows * torch.nan, "offset": offset}, header),
        "infinite offset": lambda: safetensors.torch.save({"rows": rows, "offset": offset + torch.inf}, header),
        "integers": lambda: safetensors.torch.save({"rows": rows.long(), "offset": offset}, header),
        "one number": lambda: safetensors.torch.save({"rows": rows[0], "offset": offset}, header),
        "no header": lambda: safetensors.torch.save({"rows": rows, "offset": offset}),
    }[damage]()
    with pytest.raises(CorruptArtifact, match=r"prototypes cannot be read|safetensors file"):
        DomainPrototypes.from_bytes(content)


class Root:
    """A store with routers and domains in it, and the state that names them."""

    def __init__(self, path: Path, ada: TinyAda) -> None:
        self.path, self.store = path, Store(path)
        self.store.write_version("router", ada.save)
        self.state = CatalogState(1, adapters=dict.fromkeys(DOMAINS, 1), router=1)

    def add(self, name: str, given: DomainPrototypes, examples: tuple[str, ...]) -> None:
        def write(folder: Path) -> None:
            (folder / PROTOTYPES_FILE).write_bytes(given.to_bytes())
            (folder / EXAMPLES_FILE).write_bytes(Examples(examples).to_bytes())

        version = self.store.write_version(f"adapters/{name}", write)
        files = self.store.adapter_files(self.state_with(name, version).ref(name))
        self.state = self.state_with(name, version, files[PROTOTYPES_FILE].sha256)

    def state_with(self, name: str, version: int, sha256: str | None = None) -> CatalogState:
        prototypes = self.state.prototypes if sha256 is None else {**self.state.prototypes, name: sha256}
        return CatalogState(2, None, {**self.state.adapters, name: version}, self.state.router, prototypes)


def test_the_assembly_serves_what_the_catalog_names(ada: TinyAda, tmp_path: Path) -> None:
    root = Root(tmp_path, ada)
    assembly = RouterAssembly(root.store)
    first = assembly.assemble(root.state)
    assert first is not None
    assert same(first, ada)
    root.add("tax", prototypes_from_examples(ada, 1, "tax", TAX), TAX)
    second = assembly.assemble(root.state)
    assert second is not None
    assert same(second, ada.with_domain("tax", TAX))
    gone = CatalogState(3, adapters={"weather": 1}, router=1)
    third = assembly.assemble(gone)
    assert third is not None
    assert third.domains == ("weather",)
    assert assembly.assemble(CatalogState(4, adapters={"weather": 1})) is None


def test_prototypes_of_an_older_router_are_made_again_from_the_examples(ada: TinyAda, tmp_path: Path) -> None:
    root = Root(tmp_path, ada)
    stale = DomainPrototypes(torch.zeros(2, 9999), 0.0, router=0, is_data_free=True)  # fits no encoder at all
    root.add("tax", stale, TAX)
    made = RouterAssembly(root.store).assemble(root.state)
    assert made is not None
    assert same(made, ada.with_domain("tax", TAX, is_data_free=True))


def test_rows_trained_into_a_newer_router_are_taken_before_older_prototypes(ada: TinyAda, tmp_path: Path) -> None:
    root = Root(tmp_path, ada)
    root.add("sql", prototypes_from_examples(ada, 0, "sql", TAX), TAX)
    made = RouterAssembly(root.store).assemble(root.state)
    assert made is not None
    assert same(made, ada)


def test_a_damaged_domain_is_left_out_and_the_others_are_routed(ada: TinyAda, tmp_path: Path) -> None:
    root = Root(tmp_path, ada)
    for name, examples in (("tax", TAX), ("astronomy", ASTRONOMY)):
        root.add(name, prototypes_from_examples(ada, 1, name, examples), examples)
    file = tmp_path / "adapters/tax/1" / PROTOTYPES_FILE
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assembly = RouterAssembly(root.store)
    made = assembly.assemble(root.state)
    assert made is not None
    assert same(made, ada.with_domain("astronomy", ASTRONOMY))
    assert list(assembly.problems) == ["tax"]
    file.write_bytes(good)
    healed = assembly.assemble(root.state)
    assert healed is not None
    assert "tax" in healed.domains
    assert assembly.problems == {}


def test_a_new_generation_reads_only_what_is_new(ada: TinyAda, tmp_path: Path) -> None:
    root = Root(tmp_path, ada)
    assembly = RouterAssembly(root.store)
    root.add("tax", prototypes_from_examples(ada, 1, "tax", TAX), TAX)
    assembly.assemble(root.state)
    (tmp_path / "adapters/tax/1" / PROTOTYPES_FILE).unlink()
    root.add("astronomy", prototypes_from_examples(ada, 1, "astronomy", ASTRONOMY), ASTRONOMY)
    made = assembly.assemble(root.state)
    assert made is not None
    assert {"tax", "astronomy"} <= set(made.domains)


def test_the_router_made_out_of_the_one_before_is_the_one_made_from_nothing(ada: TinyAda, tmp_path: Path) -> None:
    root = Root(tmp_path, ada)
    added = [f"{letter}{number}" for letter in "dz" for number in range(5)]
    rng = random.Random(0)
    for name in (*added, "sql"):
        for version in (1, 2):
            given = prototypes_from_examples(ada, 1, name, rng.sample(TEXTS, 1 + version), is_data_free=version == 2)
            root.add(name, given, TAX)
    assembly = RouterAssembly(root.store)
    sizes = set()
    for generation in range(1, 30):
        names = [name for name in (*added, *DOMAINS) if rng.random() < rng.choice((0.2, 0.9))]
        versions = {name: rng.choice((1, 2)) for name in names}
        files = {
            name: root.store.adapter_files(AdapterRef(name, version))
            for name, version in versions.items()
            if name in (*added, "sql")
        }
        own = {name: of_version[PROTOTYPES_FILE].sha256 for name, of_version in files.items() if rng.random() < 0.8}
        state = CatalogState(generation, adapters=versions, router=1, prototypes=own)
        made, expected = assembly.assemble(state), RouterAssembly(root.store).assemble(state)
        assert made is not None
        assert expected is not None
        assert same(made, expected)
        scored, expected_scored = made.head.fixed_prototypes(), expected.head.fixed_prototypes()
        assert torch.equal(scored.rows_RV, expected_scored.rows_RV)
        assert torch.equal(scored.starts, expected_scored.starts)
        assert torch.equal(made.head.offsets_D, expected.head.offsets_D)
        # What was rounded before is as if it had been rounded from the floats that are there now.
        anew = FixedPrototypes.of(made.head.prototypes_DPV, made.head.num_prototypes_D)
        assert torch.equal(anew.rows_RV, scored.rows_RV)
        sizes.add(len(made.domains))
    assert len(sizes) > 5
