"""What routing costs, on a nano system: routers whose choices are known give losses that are known."""

from pathlib import Path

import pytest
from rich.console import Console

from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.router.policy import Policy
from cluster.router.tiny_ada import TinyAda
from cluster.training.evaluation import EvaluationSettings, Report, evaluate
from cluster.training.run import LocalRun
from cluster.training.stage_router import chosen_domain
from tests.nano import CONTEXT_TOKENS, DOMAINS, SENTENCES, build_root, publish_router
from tests.training.rows import write_parquet

NEVER, ALWAYS = 1e3, -1e3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def trained(root: Path) -> TinyAda:
    return publish_router(root)


def _report(root: Path, tmp_path: Path, router: TinyAda, threshold: float) -> Report:
    router.policy = Policy(threshold)
    Catalog(root).publish(Change(router=write_version(root / "router", router.save)))
    domains = [*DOMAINS, *DOMAINS, *DOMAINS]
    responses = [f"number {index} of many, a long one that no greedy answer is held against." for index in range(9)]
    prompts = [f"{domain} prompt {index}" for index, domain in enumerate(domains)]
    data = write_parquet(
        tmp_path, domain=domains, prompt=prompts, response=responses, split=["train"] * 3 + ["test"] * 6
    )
    with LocalRun("evaluation", tmp_path / "run", Console(quiet=True)) as run:
        return evaluate(EvaluationSettings(root, data), run)


def test_a_router_that_never_chooses_has_the_bases_loss_and_no_regret_out_of_domain(
    root: Path, trained: TinyAda, tmp_path: Path
) -> None:
    for domain in _report(root, tmp_path, trained, NEVER).domains.values():
        assert (domain.abstained, domain.strange_abstained) == (1, 1)
        assert domain.loss.routed == domain.loss.strange == domain.loss.base
        assert domain.loss.strange_regret == 0
        assert domain.loss.regret == pytest.approx(domain.loss.base - domain.loss.oracle)
        assert domain.loss.regret != 0


def test_a_router_that_knows_one_domain_is_the_oracle_there_and_the_base_without_it(
    root: Path, trained: TinyAda, tmp_path: Path
) -> None:
    only_law = trained.without_domain("math").without_domain("sql")
    report = _report(root, tmp_path, only_law, ALWAYS).domains
    law, math = report["law"], report["math"]
    assert law.loss.routed == law.loss.oracle
    assert law.loss.regret == 0
    assert (law.loss.strange, law.strange_abstained) == (law.loss.base, 1)
    # It never knew the other one, so leaving it out changes nothing: all go through law's adapter.
    assert (math.routed_right, math.strange_abstained) == (0, 0)
    assert math.loss.strange == math.loss.routed != math.loss.base
    assert math.loss.worst_adapter != "law" or math.loss.worst == math.loss.routed


def test_losses_are_of_the_prompt_as_it_is_sent_and_the_routers_report_of_the_bare_one(
    root: Path, trained: TinyAda, tmp_path: Path
) -> None:
    trained.policy = Policy(ALWAYS)
    Catalog(root).publish(Change(router=write_version(root / "router", trained.save)))
    sent, bare = SENTENCES["law"], SENTENCES["math"][: len(SENTENCES["law"])]
    data = write_parquet(
        tmp_path,
        domain=["law"] * len(sent) * 2,
        prompt=[*sent, *sent],
        prompt_bare=[*bare, *bare],
        response=["so be it"] * len(sent) * 2,
        split=["train"] * len(sent) + ["test"] * len(sent),
    )
    with LocalRun("evaluation", tmp_path / "run", Console(quiet=True)) as run:
        report = evaluate(EvaluationSettings(root, data), run)
    assert report.domains["law"].routed_right == 1
    assert report.domains["law"].loss.routed == pytest.approx(report.domains["law"].loss.oracle, rel=0.02)
    found = [chosen_domain(decision) for decision in trained.route(bare)]
    assert report.routing.domains["law"].right == found.count("law") / len(bare) < 0.5


def test_a_prompt_that_no_server_would_take_is_answered_by_nobody(root: Path, trained: TinyAda, tmp_path: Path) -> None:
    data = write_parquet(
        tmp_path,
        domain=["law", "law"],
        prompt=["is this legal?", "is this legal? " * CONTEXT_TOKENS],
        response=["yes", "yes"],
        split=["train", "test"],
    )
    with LocalRun("evaluation", tmp_path / "run", Console(quiet=True)) as run:
        match = evaluate(EvaluationSettings(root, data), run).domains["law"].exact_match
    assert match is not None
    assert match.routed == match.base == 0


def test_the_worst_adapter_is_looked_for_among_so_many(root: Path, trained: TinyAda, tmp_path: Path) -> None:
    data = write_parquet(
        tmp_path, domain=["law"] * 2, prompt=["a b"] * 2, response=["c d"] * 2, split=["train", "test"]
    )
    with LocalRun("evaluation", tmp_path / "run", Console(quiet=True)) as run:
        of_all, of_one = (evaluate(EvaluationSettings(root, data, worst_of=n), run).domains["law"].loss for n in (9, 1))
    assert of_all.worst >= of_one.worst
    assert of_one.worst_adapter in DOMAINS
    assert of_all.worst > of_one.worst or of_all.worst_adapter == of_one.worst_adapter
