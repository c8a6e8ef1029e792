"""Pruning: what does the same is combined for nothing, what is never asked is dropped for nothing, and what a proposal
says of its cost is what an evaluation of the pruned system finds.
"""

import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rich.console import Console

from cluster.config.training import Recipe, RouterSettings, StageSettings
from cluster.errors import CatalogConflict, InvalidInput, StageOrder
from cluster.lora import peft_format
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.lora.weights import AdapterWeights, Factors
from cluster.messages import AdapterRef
from cluster.router.policy import Policy
from cluster.training import pruning_report
from cluster.training.artifacts import published_adapter, published_router
from cluster.training.data import Row, encode, read_data
from cluster.training.evaluation import EvaluationSettings, evaluate
from cluster.training.pruning import PruneSettings, Pruning, prune
from cluster.training.pruning_report import apply, write_proposal
from cluster.training.run import LocalRun
from cluster.training.similarity import cosine, functional_products
from cluster.training.stage_joint import train_joint
from cluster.training.stage_router import train_router
from tests.nano import DOMAINS, build_root, nano_base, publish_adapter, publish_router
from tests.training.rows import write_parquet

PROMPTS = {
    "law": ["the court ruled that", "is this contract valid", "sue my landlord"],
    "math": ["solve the equation", "the integral of x squared", "prove the theorem"],
    "sql": ["select name from users", "join two tables", "an index on a column"],
}


def twin_of(weights: AdapterWeights) -> AdapterWeights:
    """Other factors of the same delta: B M and M^-1 A."""
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for name, f in weights.factors.items():
        mixed = torch.randn(f.rank, f.rank, generator=generator) + 3 * torch.eye(f.rank)
        factors[name] = Factors(torch.linalg.solve(mixed, f.a_RI), f.b_OR @ mixed, f.scale)
    return AdapterWeights(factors, weights.base_fingerprint)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where math's adapter does what law's does."""
    root = build_root(tmp_path / "root")
    twin = twin_of(published_adapter(root, AdapterRef("law", 1)))
    version = write_version(root / "adapters/math", lambda folder: peft_format.save(folder, twin, "nano"))
    Catalog(root).publish(Change(adapters={"math": version}))
    publish_router(root)
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [(name, prompt, split) for name in DOMAINS for prompt in PROMPTS[name] for split in ("train", "val")]
    domains, prompts, splits = (list(column) for column in zip(*rows, strict=True))
    (tmp_path / "data").mkdir()
    responses = [f"an answer to {prompt} that is long enough" for prompt in prompts]
    return write_parquet(tmp_path / "data", domain=domains, prompt=prompts, response=responses, split=splits)


def proposed(root: Path, data: Path, tmp_path: Path, **settings: float) -> Pruning:
    with LocalRun("pruning", tmp_path / "run", Console(quiet=True)) as run:
        return prune(PruneSettings(root, data, **settings), run)  # type: ignore[arg-type]


def routed_losses(root: Path, data: Path, tmp_path: Path) -> dict[str, float]:
    with LocalRun("evaluation", tmp_path / "run", Console(quiet=True)) as run:
        report = evaluate(EvaluationSettings(root, data, "val", rows_per_domain=32), run)
    return {name: domain.loss.routed for name, domain in report.domains.items()}


def test_two_that_do_the_same_become_one_that_answers_for_both(root: Path, data: Path, tmp_path: Path) -> None:
    before = routed_losses(root, data, tmp_path)
    proposal = proposed(root, data, tmp_path, keep=2, epsilon=1e-4)
    (step,) = [step for step in proposal.report.steps if step.accepted]
    assert {step.domain, step.into} == {"law", "math"}
    assert step.cost == pytest.approx(0, abs=1e-5)
    assert proposal.report.uses["law"].similarity == pytest.approx(1, abs=1e-5)
    assert (proposal.report.num_kept, proposal.report.num_adapters) == (2, 3)
    assert proposal.report.loss_before == pytest.approx(before)
    assert Catalog(root).load().generation == proposal.report.generation
    apply(root, proposal)
    state = Catalog(root).load()
    assert (len(state.adapters), dict(state.aliases)) == (2, proposal.aliases)
    after = routed_losses(root, data, tmp_path)
    assert after == pytest.approx(proposal.report.loss_after, rel=1e-6)
    assert after == pytest.approx(before, rel=1e-4)


def test_what_was_combined_keeps_its_other_names_and_its_rows_in_a_router_that_is_trained_again(
    root: Path, data: Path, tmp_path: Path
) -> None:
    Catalog(root).publish(Change(aliases={"sums": "math", "courts": "law"}))
    proposal = proposed(root, data, tmp_path, keep=2, epsilon=1e-4)
    ((moved, into),) = proposal.aliases.items()
    apply(root, proposal)
    assert dict(Catalog(root).load().aliases) == {moved: into, "sums": into, "courts": into}
    settings = StageSettings(root=root, data=data, recipe=Recipe(router=RouterSettings(steps=4)), name="x")
    with LocalRun("router", tmp_path / "run", Console(quiet=True)) as run:
        train_router(settings, run)
        assert published_router(root, Catalog(root).load()).domains == DOMAINS
        with pytest.raises(StageOrder, match=f"{moved!r} has no adapter of its own, {into!r} answers"):
            train_joint(settings, run)


def test_what_a_proposal_says_it_costs_is_what_is_found_afterwards(root: Path, data: Path, tmp_path: Path) -> None:
    before = routed_losses(root, data, tmp_path)
    proposal = proposed(root, data, tmp_path, keep=1, epsilon=1.0, least_similarity=0.9)
    assert proposal.report.num_kept == 1
    apply(root, proposal)
    after = routed_losses(root, data, tmp_path)
    found = {name: after[name] for name in after}
    assert found == pytest.approx({name: proposal.report.loss_after[name] for name in found}, rel=1e-5)
    assert proposal.report.loss_before == pytest.approx(before)


def test_what_costs_a_domain_too_much_is_taken_back(root: Path, data: Path, tmp_path: Path) -> None:
    report = proposed(root, data, tmp_path, keep=1, epsilon=0.0, least_similarity=0.9).report
    assert all(step.accepted == (step.worst_change <= 0) for step in report.steps)
    assert max(report.changes().values()) <= 1e-12 or report.num_kept == report.num_adapters
    assert report.num_kept == 3 - sum(step.accepted for step in report.steps)


def test_what_steps_cost_adds_up_to_the_mean_of_what_the_domains_lose(root: Path, data: Path, tmp_path: Path) -> None:
    # Answers of one word and of thirty: neither counts more.
    rows = read_data(data)
    columns: dict[str, list[str]] = {"domain": [], "prompt": [], "response": [], "split": []}
    for row in rows.rows("val"):
        answer = "yes" if row.domain == "law" else "an answer that is long enough " * 5
        for name, value in zip(columns, (row.domain, row.prompt, answer, "val"), strict=True):
            columns[name].append(value)
    train = {name: values * 2 for name, values in columns.items()}
    train["split"] = ["train"] * len(rows.rows("val")) + ["val"] * len(rows.rows("val"))
    report = proposed(root, write_parquet(data, **train), tmp_path, keep=1, epsilon=10.0, least_similarity=0.9).report
    assert report.num_kept == 1
    costs = [step.cost for step in report.steps if step.accepted]
    assert sum(costs) == pytest.approx(fmean(report.changes().values()), rel=1e-6)
    assert max(map(abs, costs)) > 1e-4


def test_what_is_never_asked_is_dropped_for_nothing(root: Path, data: Path, tmp_path: Path) -> None:
    never = publish_router(root)
    never.policy = Policy(1e3)
    Catalog(root).publish(Change(router=write_version(root / "router", never.save)))
    proposal = proposed(root, data, tmp_path, keep=1, epsilon=0.0, least_similarity=1.1)
    assert [(step.into, step.cost, step.accepted) for step in proposal.report.steps] == [(None, 0.0, True)] * 2
    assert {use.mass for use in proposal.report.uses.values()} == {0.0}
    apply(root, proposal)
    assert set(Catalog(root).load().withdrawn) == set(proposal.dropped)


def test_a_report_is_kept_before_anything_changes_and_a_catalog_that_moved_on_is_left_alone(
    root: Path, data: Path, tmp_path: Path
) -> None:
    proposal = proposed(root, data, tmp_path, keep=2, epsilon=1e-4)
    folder = write_proposal(root, proposal.report)
    content = json.loads((folder / "report.json").read_text())
    assert content["num_kept"] == 2
    assert content["changes"] == pytest.approx(proposal.report.changes())
    assert "combine with" in (folder / "report.html").read_text()
    publish_adapter(root, "sql", seed=9)
    before, files = Catalog(root).load(), sorted(root.rglob("*"))
    with pytest.raises(CatalogConflict):
        apply(root, proposal)
    assert (Catalog(root).load(), sorted(root.rglob("*"))) == (before, files)
    with pytest.raises(InvalidInput, match="of 3"):
        proposed(root, data, tmp_path, keep=4)


def test_a_proposal_that_loses_a_race_leaves_no_version_to_roll_back_to(
    root: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposal = proposed(root, data, tmp_path, keep=2, epsilon=1e-4)
    versions = {name: Store(root).adapter_versions(name) for name in ("law", "math")}
    write = pruning_report._write

    def and_another_publishes(*args: Any) -> int:
        version = write(*args)
        publish_adapter(root, "sql", seed=9)
        return version

    monkeypatch.setattr(pruning_report, "_write", and_another_publishes)
    with pytest.raises(CatalogConflict):
        apply(root, proposal)
    assert {name: Store(root).adapter_versions(name) for name in ("law", "math")} == versions


def test_products_are_those_of_the_deltas_outputs(root: Path) -> None:
    base = nano_base(root)
    law, math, sql = (published_adapter(root, Catalog(root).load().ref(name)) for name in DOMAINS)
    row = Row("law", "the court ruled that", "it is so", "")
    products = functional_products(base, [law, math, sql], [row], 64)
    one = torch.eye(3, dtype=torch.float64)
    assert cosine(products, one[0], one[1]) == pytest.approx(1, abs=1e-5)
    assert cosine(products, one[0], -2 * one[1]) == pytest.approx(-1, abs=1e-5)
    # The same with dense deltas, on inputs seen by hooks of our own.
    inputs, lengths = {}, {}
    layers = {name: module for name, module in base.model.named_modules() if name in law.factors}
    for name, module in layers.items():

        def keep(_: object, given: tuple[torch.Tensor], output: torch.Tensor, name: str = name) -> None:
            inputs[name], lengths[name] = given[0][0].double(), output[0].norm(dim=-1).mean().double()

        module.register_forward_hook(keep)
    (example,) = encode(base.tokenizer, [row], 64)
    with torch.inference_mode():
        base.model.get_decoder()(input_ids=torch.tensor([example.ids[:-1]]), use_cache=False)

    def output(weights: AdapterWeights, name: str) -> torch.Tensor:
        f = weights.factors[name]
        delta = f.scale * f.b_OR.double() @ f.a_RI.double()
        return inputs[name] @ delta.T / lengths[name] / len(inputs[name]) ** 0.5

    for i, j in itertools.product(range(3), repeat=2):
        expected = sum((output((law, math, sql)[i], n) * output((law, math, sql)[j], n)).sum() for n in inputs)
        assert float(products[i, j]) == pytest.approx(float(expected), rel=1e-4)
