"""A domain trained into a system that is there: what the gate lets through is published and nothing else changes; what
it does not let through changes nothing.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from cluster.config.training import AdapterSettings, LiveDomainSettings, Recipe, StageSettings
from cluster.errors import CatalogConflict, GateRefused, InvalidData, InvalidInput, StageOrder
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.messages import NONE_DOMAIN, AdapterRef
from cluster.model.base import encode_answer, encode_prompt
from cluster.router.examples import examples_beside
from cluster.router.policy import Policy
from cluster.training.artifacts import published_adapter, published_base, published_router
from cluster.training.domain_data import read_domain
from cluster.training.pipeline import data_of
from cluster.training.recipes import RECIPES
from cluster.training.stage_domain import train_domain
from cluster.training.stage_router import chosen_domain
from cluster.training.trainable_lora import TrainableAdapters
from deployments.cli import app
from tests.nano import DOMAINS, build_root, publish_router
from tests.training.runs import FolderRun, Stopped

RECIPE = Recipe(
    adapters=AdapterSettings(rank=4, num_steps=8, tokens_per_batch=128, learning_rate=0.01), checkpoint_every_steps=2
)
KNOWN = {
    "law": ["the court ruled that", "is this contract valid", "sue my landlord", "the judge dismissed the appeal"],
    "math": ["solve the equation", "the integral of x squared", "prove the theorem", "what is 7 times 6"],
    "sql": ["select name from users", "join two tables", "an index on a column", "delete rows where id is null"],
    NONE_DOMAIN: ["good morning", "tell me a joke", "the weather is nice", "my cat sleeps all day"],
}
QUESTIONS = [f"which income tax bracket applies to {n} thousand" for n in range(20)]


def parquet(file: Path, **columns: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    root = build_root(folder / "root")
    ada = publish_router(root)
    # One that never says none leaves no room for a domain that is added.
    ada.policy = Policy(threshold=0.0)
    Catalog(root).publish(Change(router=write_version(root / "router", ada.save)))
    rows = [(domain, prompt) for domain, prompts in KNOWN.items() for prompt in prompts]
    for split in ("train", "val"):
        parquet(
            folder / "data" / f"{split}.parquet",
            domain=[domain for domain, _ in rows],
            prompt=[prompt for _, prompt in rows],
            response=["so it is"] * len(rows),
            split=[split] * len(rows),
        )
    return folder


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(template / "root", tmp_path / "root")
    (copy / "training.json").write_text(
        json.dumps({"data": str(template / "data"), "recipe": "nano", "base": None, "done": ["base"]})
    )
    return copy


@pytest.fixture
def data(tmp_path: Path) -> Path:
    answers = [f"the bracket of {n} thousand" for n in range(20)]
    return parquet(tmp_path / "tax.parquet", prompt=QUESTIONS, response=answers)


def settings(root: Path, data: Path, domain: str = "tax", **live: Any) -> StageSettings:
    live = {"others": data_of(root), **live}
    return StageSettings(
        root=root, data=data, recipe=RECIPE, name="nano", live=LiveDomainSettings(domain=domain, **live)
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def slow_loss(root: Path, prompts: list[str], responses: list[str], ref: AdapterRef | None) -> float:
    """Nats per token of the responses, one row at a time, by transformers' own forward."""
    base = published_base(root, Catalog(root).load())
    if ref is not None:
        TrainableAdapters(base.model, {"own": published_adapter(root, ref)}).select("own")
    total, count = 0.0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        asked = encode_prompt(base.tokenizer, prompt)
        answer = [*encode_answer(base.tokenizer, response), base.tokenizer.eos_token_id]
        with torch.no_grad():
            logits_TV = base.model(input_ids=torch.tensor([[*asked, *answer]])).logits[0, len(asked) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


def test_it_is_published_in_one_generation_and_nothing_else_changes(root: Path, data: Path, tmp_path: Path) -> None:
    before, catalog = contents(root), Catalog(root)
    state, router = catalog.load(), published_router(root, catalog.load())
    run = FolderRun(tmp_path / "run")
    train_domain(settings(root, data), run)
    after = catalog.load()
    assert after.generation == state.generation + 1
    assert after.adapters == {**state.adapters, "tax": 1}
    now = contents(root)
    assert {name: now[name] for name in before} == before
    own = {"adapters/tax/1/", f"catalog/{after.generation}.json"}
    assert all(any(name.startswith(one) for one in own) for name in now.keys() - before.keys())
    # Other domains' logits, bit for bit.
    texts = [*QUESTIONS, *(text for texts in KNOWN.values() for text in texts)]
    grown = published_router(root, after)
    logits, grown_logits = router.logits(texts), grown.logits(texts)
    kept = [grown.domains.index(name) for name in router.domains]
    assert torch.equal(logits[:, : len(router.domains)], grown_logits[:, kept])
    assert examples_beside(Store(root), AdapterRef("tax", 1)) is not None
    made = json.loads((root / "adapters/tax/1/zephyra.json").read_text())["metadata"]
    assert (made["stage"], made["recipe"], made["seed"]) == ("domain", "nano", 0)


def test_what_the_gate_says_is_what_a_slow_measurement_finds(root: Path, data: Path, tmp_path: Path) -> None:
    train_domain(settings(root, data), FolderRun(tmp_path / "run"))
    held_out = read_domain(data, "tax", RECIPE.bad_rows, 0.1).held_out
    rows = [row.prompt for row in held_out], [row.response for row in held_out]
    gate = json.loads((root / "adapters/tax/1/zephyra.json").read_text())["metadata"]["gate"]
    assert gate[0]["before"] == pytest.approx(slow_loss(root, *rows, None), rel=1e-4)
    assert gate[0]["after"] == pytest.approx(slow_loss(root, *rows, AdapterRef("tax", 1)), rel=1e-4)
    assert gate[0]["after"] < gate[0]["before"]
    router = published_router(root, Catalog(root).load())
    chosen = [max(d.weights, key=lambda name: d.weights[name]) for d in router.route(rows[0])]
    assert gate[1]["after"] == chosen.count("tax") / len(chosen)
    assert {line["what"].split()[2] for line in gate[2:]} <= {*DOMAINS, NONE_DOMAIN}


def test_one_that_takes_what_others_know_changes_nothing(root: Path, data: Path, tmp_path: Path) -> None:
    # Held-out prompts of others, each of the domain that it finds today, which the new one would take.
    router = published_router(root, Catalog(root).load())
    owners = [chosen_domain(decision) for decision in router.route(QUESTIONS)]
    rows = {"prompt": QUESTIONS * 2, "domain": owners * 2, "response": ["so it is"] * 40}
    parquet(tmp_path / "others/part.parquet", **rows, split=["train"] * 20 + ["val"] * 20)
    before = contents(root)
    run = FolderRun(tmp_path / "run")
    with pytest.raises(
        GateRefused, match=f"nothing was changed: prompts of ({'|'.join(owners)}) that find it is 0.000"
    ):
        train_domain(settings(root, data, others=tmp_path / "others"), run)
    assert contents(root) == before
    assert any("refused" in text for text in run.said), "the table is told all the same"
    train_domain(settings(root, data, others=tmp_path / "others", epsilon=1.0), FolderRun(tmp_path / "run2"))


def test_one_that_is_not_found_changes_nothing(root: Path, tmp_path: Path) -> None:
    prompts = [*KNOWN["sql"], *KNOWN["law"], *KNOWN["math"]]
    data = parquet(tmp_path / "given.parquet", prompt=prompts, response=["so it is"] * len(prompts))
    before = contents(root)
    with pytest.raises(GateRefused, match=r"nothing was changed: .*prompts of tax that find it"):
        train_domain(settings(root, data, least_recall=1.0), FolderRun(tmp_path / "run"))
    assert contents(root) == before


def test_an_adapter_that_is_worse_than_the_base_is_refused(root: Path, tmp_path: Path) -> None:
    # What is held out answers otherwise than what is learned.
    data = parquet(
        tmp_path / "given.parquet",
        prompt=[*QUESTIONS, *QUESTIONS],
        response=["seven"] * 20 + ["the quick brown fox jumps over the lazy dog"] * 20,
        split=["train"] * 20 + ["val"] * 20,
    )
    before = contents(root)
    recipe = RECIPE.model_copy(update={"adapters": AdapterSettings(rank=4, num_steps=60, learning_rate=0.01)})
    with pytest.raises(GateRefused, match="loss of tax"):
        train_domain(settings(root, data).model_copy(update={"recipe": recipe}), FolderRun(tmp_path / "run"))
    assert contents(root) == before


def test_a_stopped_training_goes_on_and_ends_as_the_unbroken_one(root: Path, data: Path, tmp_path: Path) -> None:
    train_domain(settings(root, data), FolderRun(tmp_path / "whole"))
    with pytest.raises(Stopped):
        train_domain(settings(root, data), FolderRun(tmp_path / "broken", stop_after=4))
    resumed = FolderRun(tmp_path / "broken")
    train_domain(settings(root, data), resumed)
    assert resumed.steps == [5, 6, 7, 8]
    assert "tax@1 is published; this becomes its next version" in " ".join(resumed.said)
    first, second = (published_adapter(root, AdapterRef("tax", version)) for version in (1, 2))
    for name, factors in first.factors.items():
        assert torch.equal(factors.a_RI, second.factors[name].a_RI)
        assert torch.equal(factors.b_OR, second.factors[name].b_OR)


def test_names_and_roots_are_checked_before_anything_is_trained(root: Path, data: Path, tmp_path: Path) -> None:
    Catalog(root).publish(Change(aliases={"fiscal": "law"}))
    run = FolderRun(tmp_path / "run")
    with pytest.raises(InvalidInput, match="'fiscal' is an alias of 'law'"):
        train_domain(settings(root, data, "fiscal"), run)
    with pytest.raises(InvalidInput, match="cannot name a domain"):
        train_domain(settings(root, data, "../law"), run)
    with pytest.raises(InvalidInput, match="needs the name"):
        train_domain(StageSettings(root=root, data=data, recipe=RECIPE, name="nano"), run)
    with pytest.raises(StageOrder, match="no base yet"):
        train_domain(settings(tmp_path / "empty", data), run)
    assert run.steps == []


def test_who_loses_the_base_meanwhile_leaves_no_version(root: Path, data: Path, tmp_path: Path) -> None:
    class Raced(FolderRun):
        def say(self, text: str) -> None:
            if "that find it" in text:
                Catalog(root).publish(Change(base=2))

    with pytest.raises(CatalogConflict):
        train_domain(settings(root, data), Raced(tmp_path / "run"))
    assert Store(root).adapter_versions("tax") == []


def test_what_is_held_out_is_the_same_each_time_and_shares_no_prompt(data: Path, tmp_path: Path) -> None:
    first, second = (read_domain(data, "tax", RECIPE.bad_rows, 0.25) for _ in range(2))
    assert first == second
    assert (len(first.train), len(first.held_out)) == (15, 5)
    assert any("held out 5 of 20 rows" in text for text in first.told)
    twice = parquet(tmp_path / "twice.parquet", prompt=QUESTIONS * 2, response=["a"] * 40)
    both = read_domain(twice, "tax", RECIPE.bad_rows, 0.25)
    assert {row.prompt for row in both.held_out} == {row.prompt for row in first.held_out}
    assert not {row.prompt for row in both.train} & {row.prompt for row in both.held_out}


def test_a_folder_with_splits_and_other_domains_is_taken_as_it_is(template: Path) -> None:
    data = read_domain(template / "data", "law", RECIPE.bad_rows, 0.1)
    assert [row.prompt for row in data.train] == [row.prompt for row in data.held_out] == KNOWN["law"]
    assert data.told == ()
    with pytest.raises(InvalidData, match=r"of 'tax' \(its domains are law, math"):
        read_domain(template / "data", "tax", RECIPE.bad_rows, 0.1)


def test_the_command(root: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "nano", RECIPE)

    def train(data: Path) -> Result:
        given = ["domains", "train", "tax", "--data", str(data), "--root", str(root)]
        return CliRunner().invoke(app, given, env={"COLUMNS": "200"})

    prompts = [*KNOWN["sql"], *KNOWN["law"]]
    stolen = parquet(tmp_path / "stolen.parquet", prompt=prompts, response=["so it is"] * len(prompts))
    refused, published, again = train(stolen), train(data), train(data)
    assert refused.exit_code == 1, refused.output
    assert "'tax' was not published, and nothing was changed" in refused.output
    assert published.exit_code == 0, published.output
    assert "published tax@1: routed by 18 examples" in published.output
    assert "prompts of tax that find it" in published.output
    assert "tax@1 is published; this becomes its next version" in again.output
    assert Catalog(root).load().adapters["tax"] == 2
    rolled = CliRunner().invoke(app, ["domains", "rollback", "tax", "--root", str(root)])
    assert "current is tax@1" in rolled.output


def test_other_rows_under_the_same_name_do_not_resume_what_the_old_ones_began(root: Path, data: Path) -> None:
    before = settings(root, data).mark
    assert settings(root, data).mark == before
    parquet(data, prompt=QUESTIONS, response=["one and the same bracket"] * len(QUESTIONS))
    in_a_file = settings(root, data).mark
    folder = data.parent / "folder"
    parquet(folder / "a.parquet", prompt=QUESTIONS, response=QUESTIONS)
    in_a_folder = settings(root, folder).mark
    parquet(folder / "b.parquet", prompt=QUESTIONS, response=QUESTIONS)
    assert len({before, in_a_file, in_a_folder, settings(root, folder).mark}) == 4
