"""The stages as a whole, on the starter's data and a recipe of a few steps: order, publishing, resuming."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.config.training import AdapterSettings, BaseSettings, JointSettings, Recipe, RouterSettings, StageSettings
from cluster.errors import CatalogConflict, InvalidData, InvalidInput, StageOrder
from cluster.lora.catalog import Catalog, Change
from cluster.router.policy import Policy
from cluster.router.sentence_encoder import SentenceEncoder
from cluster.router.tiny_ada import TinyAda
from cluster.training import STAGES, stage_joint
from cluster.training.artifacts import published_adapter, published_base
from cluster.training.data import data_digest, encode, read_data
from cluster.training.one_pass import mean_losses
from tests.router.small_bert import write_small_bert
from tests.training.runs import FolderRun, Stopped

_TUNED = "encoder.layer.1.output.dense.weight"
RECIPE = Recipe(
    base=BaseSettings(size="nano", num_steps=6, tokens_per_batch=256),
    adapters=AdapterSettings(rank=2, num_steps=4, tokens_per_batch=128),
    router=RouterSettings(steps=6),
    joint=JointSettings(num_steps=2, rows_per_domain=2, epsilon=10.0),
    val_rows_per_domain=4,
    checkpoint_every_steps=2,
)


@pytest.fixture
def data(little_starter: Path) -> Path:
    return little_starter


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Sums in another order would differ in the last bit.
    torch.set_num_threads(1)


def settings(root: Path, data: Path, recipe: Recipe = RECIPE) -> StageSettings:
    return StageSettings(root=root, data=data, recipe=recipe, name="test")


@pytest.fixture(scope="module")
def three_stages(little_starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root after the stages before the joint one; not to be changed."""
    place = tmp_path_factory.mktemp("three-stages")
    for name in ("base", "adapters", "router"):
        STAGES[name](settings(place / "root", little_starter), FolderRun(place / name))
    return place / "root"


@pytest.fixture
def for_joint(three_stages: Path, tmp_path: Path) -> Path:
    """A root of the test's own that is ready for the joint stage."""
    return shutil.copytree(three_stages, tmp_path / "root")


def artifacts(root: Path) -> dict[str, torch.Tensor]:
    """Every published tensor by its file and name."""
    return {
        f"{file.relative_to(root)}:{name}": tensor
        for file in sorted(root.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_all_stages_publish_in_order_and_a_resumed_run_equals_the_unbroken_one(tmp_path: Path, data: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for name, stage in STAGES.items():
        whole = FolderRun(tmp_path / "a" / name)
        stage(settings(unbroken, data), whole)
        with pytest.raises(Stopped):
            stage(settings(broken, data), FolderRun(tmp_path / "b" / name, stop_after=2))
        resumed = FolderRun(tmp_path / "b" / name)
        if name == "joint":  # two steps in all: it was stopped after the last one
            assert whole.steps == [1, 2]
        stage(settings(broken, data), resumed)
        assert resumed.steps == [step for step in whole.steps if step > 2]
        assert any("resuming" in text for text in resumed.said)
    one, other = artifacts(unbroken), artifacts(broken)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    state = Catalog(unbroken).load()
    assert (state.base, state.router, len(state.adapters)) == (1, 2, 8)
    assert set(state.adapters.values()) == {2}
    made = {
        stage: json.loads((unbroken / file).read_text())
        for stage, file in {
            "base": "base/1/training.json",
            "router": "router/1/training.json",
            "joint": "router/2/training.json",
        }.items()
    }
    for stage, version in (("adapters", 1), ("joint", 2)):
        ours = json.loads((unbroken / f"adapters/sql/{version}/zephyra.json").read_text())
        assert ours["metadata"] == made.get(stage, {**made["base"], "stage": stage})
    assert {name: of["stage"] for name, of in made.items()} == {name: name for name in made}
    assert {of["data"] for of in made.values()} == {data_digest(data)}


def test_stages_tune_a_pretrained_encoder_and_leave_what_is_given_as_it_is(tmp_path: Path, data: Path) -> None:
    (tmp_path / "small-bert").mkdir()
    bert = write_small_bert(tmp_path / "small-bert")
    given = load_file(bert / "model.safetensors")
    router = RECIPE.router.model_copy(update={"sentence_encoder": str(bert)})
    recipe = RECIPE.model_copy(update={"router": router})
    for name, stage in STAGES.items():
        stage(settings(tmp_path / "root", data, recipe), FolderRun(tmp_path / name))
    versions = [tmp_path / "root" / "router" / str(number) for number in (1, 2)]
    first, second = (TinyAda.load(version) for version in versions)
    assert isinstance(first.encoder, SentenceEncoder)
    assert isinstance(second.encoder, SentenceEncoder)
    assert not torch.equal(first.encoder.projection.weight, second.encoder.projection.weight), "trained jointly"
    one, two = (load_file(version / "sentence_encoder" / "model.safetensors") for version in versions)
    assert one.keys() == two.keys() == given.keys()
    assert all(torch.equal(one[name], two[name]) for name in given), "the joint stage leaves it alone"
    # Of the small BERT's two layers both are the last two.
    assert {name for name in given if not torch.equal(one[name], given[name])} <= {
        name for name in given if name.startswith("encoder.layer.")
    }
    assert not torch.equal(one[_TUNED], given[_TUNED])
    kept = load_file(bert / "model.safetensors")
    assert all(torch.equal(kept[name], given[name]) for name in given)


def test_a_joint_stage_that_costs_a_domain_publishes_nothing(tmp_path: Path, data: Path, for_joint: Path) -> None:
    # A rate that throws the adapters away: some domain loses far more than epsilon.
    ruinous = JointSettings(num_steps=2, rows_per_domain=2, adapter_learning_rate=1.0, epsilon=0.005)
    recipe = RECIPE.model_copy(update={"joint": ruinous})
    run = FolderRun(tmp_path / "joint")
    STAGES["joint"](settings(for_joint, data, recipe), run)
    state = Catalog(for_joint).load()
    assert set(state.adapters.values()) == {1}
    assert state.router == 1
    assert any("not published" in text and "lost" in text for text in run.said)


def test_a_joint_stage_leaves_alone_what_came_and_went_meanwhile(tmp_path: Path, data: Path, for_joint: Path) -> None:
    catalog = Catalog(for_joint)
    trained = sorted(catalog.load().adapters)
    catalog.publish(Change(withdrawn=(trained[0],)))

    class Interrupted(FolderRun):
        def report(self, step: int, metrics: Mapping[str, float]) -> None:
            super().report(step, metrics)
            catalog.publish(Change(adapters={f"live{step}": 1}))

    STAGES["joint"](settings(for_joint, data), Interrupted(tmp_path / "joint"))
    assert catalog.load().adapters == {**dict.fromkeys(trained[1:], 2), "live1": 1, "live2": 1}
    assert catalog.load().router == 2


def test_a_joint_stage_with_a_rate_for_the_base_publishes_all_in_one_generation(
    tmp_path: Path, data: Path, for_joint: Path
) -> None:
    root, rate = for_joint, 1e-3
    Catalog(root).publish(Change(aliases={"database": "sql"}))
    before = Catalog(root).load()
    joint = RECIPE.joint.model_copy(update={"base_learning_rate": rate})
    recipe = RECIPE.model_copy(update={"joint": joint})
    run = FolderRun(tmp_path / "joint")
    STAGES["joint"](settings(root, data, recipe), run)
    state = Catalog(root).load()
    assert state.generation == before.generation + 1
    assert (state.base, state.router, set(state.adapters.values())) == (2, 2, {2})
    assert (state.adapters.keys(), state.aliases) == (before.adapters.keys(), before.aliases)
    base = published_base(root, state)
    old = published_base(root, before)
    moved = {name: (p - old.model.get_parameter(name)).abs().max() for name, p in base.model.named_parameters()}
    # AdamW moves by about its rate, at each of two steps, and the schedule's decay has begun.
    assert all(0 < move <= 2.1 * rate for move in moved.values())
    for domain in state.adapters:
        weights = published_adapter(root, state.ref(domain))
        assert weights.base_fingerprint == base.fingerprint != old.fingerprint
    # What is published does what was measured: each domain's loss, and none's through the plain base.
    rows = read_data(data)
    names = (*sorted(state.adapters), "none")
    told = next(text for text in run.said if text.startswith("joint stage, change"))
    for name in names:
        of_name = rows.rows("val", name, RECIPE.val_rows_per_domain)
        losses = []
        for at, of_base in ((before, old), (state, base)):
            adapters = {} if name == "none" else {name: published_adapter(root, at.ref(name))}
            examples = {name: encode(of_base.tokenizer, of_name, joint.max_tokens)}
            losses.append(mean_losses(of_base, adapters, examples)[name])
        assert f"{name} {losses[1] / losses[0] - 1:+.1%}" in told


def test_a_base_that_others_adapters_belong_to_is_not_changed(tmp_path: Path, data: Path, for_joint: Path) -> None:
    joint = RECIPE.joint.model_copy(update={"base_learning_rate": 1e-4})
    changing = settings(for_joint, data, RECIPE.model_copy(update={"joint": joint}))
    catalog = Catalog(for_joint)

    class Interrupted(FolderRun):
        def report(self, step: int, metrics: Mapping[str, float]) -> None:
            super().report(step, metrics)
            catalog.publish(Change(adapters={"live": 1}))

    with pytest.raises(CatalogConflict, match="changed during the joint stage"):
        STAGES["joint"](changing, Interrupted(tmp_path / "interrupted"))
    with pytest.raises(StageOrder, match="the adapter of 'live', which was trained on it, is none of those"):
        STAGES["joint"](changing, FolderRun(tmp_path / "joint"))
    assert (catalog.load().base, set(catalog.load().adapters.values())) == (1, {1})


def test_a_joint_stage_whose_loss_is_no_number_publishes_nothing(tmp_path: Path, data: Path, for_joint: Path) -> None:
    before = Catalog(for_joint).load()
    for rates in ({"adapter_learning_rate": 1.0, "num_steps": 40}, {"base_learning_rate": 1.0, "num_steps": 40}):
        joint = RECIPE.joint.model_copy(update={"epsilon": math.inf, "router_loss_weight": 1e38, **rates})
        with pytest.raises(InvalidInput, match=r"no finite numbers at step \d+; what stage 3 published stays"):
            STAGES["joint"](
                settings(for_joint, data, RECIPE.model_copy(update={"joint": joint})), FolderRun(tmp_path / "x")
            )
    assert Catalog(for_joint).load() == before


def test_a_router_that_collapses_is_not_published(
    tmp_path: Path, data: Path, for_joint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(router: TinyAda, *_: object) -> TinyAda:
        """Everything goes to the first domain."""
        for name in router.domains[1:]:
            router = router.without_domain(name)
        router.policy = Policy(-1e3)
        return router

    monkeypatch.setattr(stage_joint, "_calibrated", collapsed)
    run = FolderRun(tmp_path / "joint")
    STAGES["joint"](settings(for_joint, data), run)
    assert re.search(r"not published: the router collapses, its prompts use 1\.0 domains in effect where", run.said[-1])
    assert set(Catalog(for_joint).load().adapters.values()) == {1}


def test_the_spread_of_a_batch_is_that_of_its_probabilities_written_out() -> None:
    p_BN = torch.tensor([[0.7, 0.1, 0.2], [0.3, 0.3, 0.4]], dtype=torch.float64)
    shares = [(0.7 + 0.3) / 1.4, (0.1 + 0.3) / 1.4]
    expected = {
        "effective_domains": math.exp(-sum(share * math.log(share) for share in shares)),
        "entropy": -sum(p * math.log(p) for row in p_BN.tolist() for p in row) / 2,
    }
    assert stage_joint._spread(p_BN.log()) == pytest.approx(expected)


@pytest.mark.parametrize(("stage", "needs"), [("adapters", "base"), ("router", "base"), ("joint", "base")])
def test_a_stage_before_the_one_it_needs_says_so(tmp_path: Path, data: Path, stage: str, needs: str) -> None:
    with pytest.raises(StageOrder, match=f"run stage '{needs}' first"):
        STAGES[stage](settings(tmp_path / "root", data), FolderRun(tmp_path / "run"))
    assert Catalog(tmp_path / "root").latest() == 0


def test_a_new_base_withdraws_what_belonged_to_the_old(tmp_path: Path, data: Path) -> None:
    root = tmp_path / "root"
    for name in ("base", "adapters", "base"):
        STAGES[name](settings(root, data), FolderRun(tmp_path / f"{name}-{Catalog(root).latest()}"))
    state = Catalog(root).load()
    assert state.base == 2
    assert state.adapters == {}
    with pytest.raises(StageOrder, match="run stage 'adapters' first"):
        STAGES["router"](settings(root, data), FolderRun(tmp_path / "router"))


def test_no_data_no_base(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidData, match="no Parquet file"):
        STAGES["base"](settings(tmp_path / "root", tmp_path / "empty"), FolderRun(tmp_path / "run"))
