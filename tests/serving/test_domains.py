"""Domains come and go while a system serves, from a folder and from a bucket; what is wrong with one is said first."""

import asyncio
import json
import shutil
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import (
    CatalogConflict,
    IncompatibleAdapter,
    InvalidInput,
    StageOrder,
    UnknownDomain,
)
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, Change
from cluster.lora.packed_adapter import pack
from cluster.messages import AdapterRef, ClientRequest, Mixture, SamplingParams
from cluster.router.tiny_ada import TinyAda
from deployments.cli import app
from deployments.domains.operations import Domains
from deployments.monitoring.probes import read_probes
from deployments.router import Router
from tests.nano import DOMAINS, nano_base, publish_adapter
from tests.serving.handed_in import REFUSED, TAX
from tests.serving.local import local_system


@pytest.fixture
def own_root(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template / "root", tmp_path / "root")


@pytest.fixture
def domains(own_root: Path) -> Domains:
    return Domains(Store(own_root))


def in_bucket(root: Path, uri: str) -> str:
    """The same artifacts and the same state in a bucket."""
    store, state = Store(uri), Catalog(root).load()
    for parent in ("base", "router", *(f"adapters/{domain}" for domain in state.adapters)):
        for version in range(1, len(list((root / parent).iterdir())) + 1):
            source = root / parent / str(version)
            (source / "checksums.json").unlink()
            assert store.write_version(parent, lambda f, s=source: shutil.copytree(s, f, dirs_exist_ok=True)) == version
    Catalog(store).publish(Change(base=state.base))
    Catalog(store).publish(Change(adapters=state.adapters, router=state.router))
    return uri


async def tokens(system: Any, model: str) -> list[int]:
    request = ClientRequest("what is", model, sampling=SamplingParams(max_tokens=12))
    answer = await system.gateway.answer(request)
    async with aclosing(answer):
        return [token async for piece in answer.pieces() for token in piece.chunk.token_ids]


async def until(condition: Callable[[], bool], seconds: float = 1.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def test_what_peft_saved_is_published_byte_for_byte_and_routed(own_root: Path, adapter: Path, domains: Domains) -> None:
    ref = domains.add("tax", adapter, TAX).ref
    assert ref == AdapterRef("tax", 1)
    folder = Store(own_root).adapter_folder(ref)
    assert pack(folder).tensors.tobytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert pack(folder).base_fingerprint == nano_base(own_root).fingerprint
    (info,) = [info for info in domains.all() if info.name == "tax"]
    assert (info.version, info.rank, info.is_data_free, info.problem) == (1, 4, False, None)
    assert 1 <= info.num_prototypes <= len(TAX)
    assert info.num_bytes == sum(file.stat().st_size for file in folder.iterdir() if file.name != "checksums.json")
    assert [info.name for info in domains.all()] == sorted([*DOMAINS, "tax"])


def test_without_examples_it_answers_by_name_and_data_free_it_is_marked(adapter: Path, domains: Domains) -> None:
    domains.add("silent", adapter)
    domains.add("guessed", adapter, is_data_free=True)
    found = {info.name: (info.num_prototypes > 0, info.is_data_free) for info in domains.all()}
    assert (found["silent"], found["guessed"]) == ((False, False), (True, True))
    with pytest.raises(InvalidInput, match="give one of both"):
        domains.add("tax", adapter, TAX, is_data_free=True)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_before_anything_is_written(
    own_root: Path, adapter: Path, domains: Domains, case: str
) -> None:
    spoil, error, said = REFUSED[case]
    before = sorted(file for file in own_root.rglob("*"))
    spoil(adapter)
    with pytest.raises(error, match=said):
        domains.add("tax", adapter, TAX)
    assert sorted(file for file in own_root.rglob("*")) == before


def test_names_generations_and_roots_are_checked(
    own_root: Path, adapter: Path, domains: Domains, tmp_path: Path
) -> None:
    before = sorted(file for file in own_root.rglob("*"))
    for name in ("../law", "Law", "none", "a/b"):
        with pytest.raises(InvalidInput, match="cannot name a domain"):
            domains.add(name, adapter, TAX)
    assert sorted(file for file in own_root.rglob("*")) == before
    generation = Catalog(own_root).latest()
    with pytest.raises(CatalogConflict, match=f"at generation {generation}, not 1"):
        domains.add("tax", adapter, TAX, expected_generation=1)
    with pytest.raises(CatalogConflict, match="not 1"):
        domains.remove("law", expected_generation=1)
    with pytest.raises(StageOrder, match="no base yet"):
        Domains(Store(tmp_path / "empty")).add("tax", adapter)


def test_a_new_version_without_examples_is_routed_as_the_one_before(
    own_root: Path, adapter: Path, domains: Domains
) -> None:
    domains.add("tax", adapter, TAX)
    before = Catalog(own_root).load()
    domains.add("tax", adapter)
    assert (after := Catalog(own_root).load()).adapters["tax"] == 2
    assert after.prototypes == before.prototypes
    domains.add("guessed", adapter, is_data_free=True)
    domains.add("guessed", adapter)
    assert "guessed" not in Catalog(own_root).load().prototypes, "words of the adapter before say nothing of this one"


def test_without_probes_of_its_own_a_root_gives_the_examples_that_it_keeps(
    own_root: Path, adapter: Path, domains: Domains
) -> None:
    prompts = [f"{TAX[0]} {number}" for number in range(30)]
    domains.add("tax", adapter, prompts)
    probes = read_probes(Store(own_root), Catalog(own_root).load())
    assert [(probe.prompt, probe.domain) for probe in probes] == [(prompt, "tax") for prompt in prompts[:20]]


class RacedStore(Store):
    """Another publisher is quicker, between what is written and what is published."""

    def write_version(self, parent: str, write: Callable[[Path], None]) -> int:
        version = super().write_version(parent, write)
        other = Catalog(Store(self.storage))
        other.publish(Change(aliases={f"other-{other.latest()}": "law"}))
        return version


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_who_lost_a_race_leaves_no_version_to_roll_back_to(
    own_root: Path, adapter: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    root = own_root if kind == "folder" else in_bucket(own_root, request.getfixturevalue("s3_root"))
    domains = Domains(store := RacedStore(root))
    with pytest.raises(CatalogConflict):
        domains.add("law", adapter, TAX, expected_generation=Catalog(root).latest())
    assert store.adapter_versions("law") == [1]
    with pytest.raises(UnknownDomain, match="no adapter law@2"):
        domains.rollback("law", 2)
    assert domains.add("law", adapter, TAX).version == 3, "without a generation expected both are published"


def test_a_rollback_brings_back_the_version_with_its_prototypes(
    own_root: Path, adapter: Path, domains: Domains
) -> None:
    domains.add("tax", adapter, TAX)
    first = Catalog(own_root).load()
    domains.add("tax", adapter, ["entirely other words", "nothing of the kind"])
    second = Catalog(own_root).load()
    assert first.prototypes["tax"] != second.prototypes["tax"]
    assert domains.rollback("tax").ref == AdapterRef("tax", 1)
    assert Catalog(own_root).load().prototypes == first.prototypes
    assert domains.rollback("tax", 2).ref == AdapterRef("tax", 2)
    assert Catalog(own_root).load().prototypes == second.prototypes
    assert domains.show("tax").versions == (1, 2)
    domains.rollback("tax", 1)
    with pytest.raises(UnknownDomain, match="no version of 'tax' before 1"):
        domains.rollback("tax")
    with pytest.raises(UnknownDomain, match="no adapter tax@9"):
        domains.rollback("tax", 9)
    domains.remove("tax")
    with pytest.raises(UnknownDomain, match="was withdrawn"):
        domains.rollback("tax")
    assert domains.rollback("tax", 2).ref == AdapterRef("tax", 2), "back from where it was withdrawn"


def test_a_rollback_to_another_bases_version_is_refused(own_root: Path, domains: Domains) -> None:
    publish_adapter(own_root, "foreign", seed=1, base_fingerprint="0" * 16)
    publish_adapter(own_root, "foreign", seed=1)
    with pytest.raises(IncompatibleAdapter, match="foreign@1 was trained on base 0000000000000000"):
        domains.rollback("foreign")


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["folder", "bucket"])
async def test_a_running_system_follows_within_a_second(
    own_root: Path, adapter: Path, where: str, request: pytest.FixtureRequest
) -> None:
    alone = local_system(own_root, DOMAINS)
    expected = await tokens(alone, "zephyra:law")
    alone.replica.engine.stop()
    root = str(own_root) if where == "folder" else in_bucket(own_root, request.getfixturevalue("s3_root"))
    system, router = local_system(root, DOMAINS), Router(root)
    assert await tokens(system, "zephyra:law") == expected
    domains = Domains(Store(root))
    ref = domains.add("tax", adapter, TAX).ref
    await until(lambda: "tax" in system.gateway.state.adapters)
    routed = await tokens(system, "zephyra:tax")
    assert routed != expected
    await until(lambda: "tax" in router._ada.domains)
    (decision,) = await router.route([TAX[0]])
    (as_added_by_hand,) = TinyAda.load(own_root / "router/1").with_domain("tax", TAX).route([TAX[0]])
    assert decision.probabilities == as_added_by_hand.probabilities
    domains.set_alias("fiscal", "tax")
    domains.set_tag("tax", "stable", ref.version)
    await until(lambda: "fiscal" in system.gateway.state.aliases and "tax" in system.gateway.state.tags)
    assert await tokens(system, "zephyra:fiscal") == await tokens(system, "zephyra:tax@stable") == routed
    domains.remove("tax")
    await until(lambda: "tax" not in system.gateway.state.adapters and "tax" not in router._ada.domains)
    for name in ("zephyra:tax", "zephyra:tax@1", "zephyra:fiscal"):
        with pytest.raises(UnknownDomain):
            await tokens(system, name)
    system.replica.engine.stop()


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["domains", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_the_commands(
    own_root: Path, adapter: Path, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    root = own_root if where == "folder" else in_bucket(own_root, request.getfixturevalue("s3_root"))
    (tmp_path / "tax.txt").write_text("\n".join(TAX))
    (tmp_path / "tax.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in TAX))
    for version, file in ((1, "tax.txt"), (2, "tax.jsonl")):
        added = run("add", "tax", "--adapter", adapter, "--examples", tmp_path / file, "--root", root)
        assert added.exit_code == 0, added.output
        assert f"published tax@{version}: routed by 3 examples" in added.output
    assert "current is tax@1" in run("rollback", "tax", "--root", root).output
    assert "tax@stable is tax@2" in run("tag", "tax", "stable", 2, "--root", root).output
    assert "fiscal names tax" in run("alias", "fiscal", "tax", "--root", root).output
    listed = run("list", "--root", root).output
    (row,) = [line.split() for line in listed.splitlines() if line.split()[:1] == ["tax"]]
    assert (row[0], row[1], row[2], row[-2:]) == ("tax", "1", "4", ["stable=2", "fiscal"])
    assert "4 domains" in listed
    assert "versions written: 1, 2" in run("show", "tax", "--root", root).output
    assert "withdrew tax" in run("remove", "tax", "--root", root).output
    refused = run("remove", "tax", "--root", root)
    assert (refused.exit_code, "was withdrawn" in refused.stderr) == (1, True)
    assert run("add", "tax", "--adapter", adapter, "--examples", tmp_path / "none.txt", "--root", root).exit_code == 1


def test_one_damaged_domain_does_not_hide_the_others(own_root: Path, adapter: Path, domains: Domains) -> None:
    domains.add("tax", adapter, TAX)
    (own_root / "adapters/tax/1/checksums.json").write_text("{")
    found = {info.name: info for info in domains.all()}
    assert "cannot be read" in str(found["tax"].problem)
    assert found["law"].problem is None
    assert found["law"].rank == 4


def test_the_names_of_a_mixture_may_be_aliases(own_root: Path) -> None:
    state = Catalog(own_root).publish(Change(aliases={"legal": "law"}))
    assert Mixture.of({state.resolve("legal"): 1.0}) == Mixture.of({AdapterRef("law", 1): 1.0})
