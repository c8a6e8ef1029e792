"""All domains in one pass against each alone, written out: single documents, plain autograd, torch's own optimizer."""

import copy
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

import cluster.training.one_pass as one_pass_module
from cluster.config.training import AdapterSettings, DomainAdapterSettings
from cluster.errors import InvalidInput
from cluster.lora.weights import AdapterWeights, Factors, adaptable_layers
from cluster.model.base import Base
from cluster.training.data import BatchPlan, Example
from cluster.training.documents import takes_documents
from cluster.training.grouped_lora import AdapterShape, GroupedAdapters
from cluster.training.one_pass import FitSettings, Fitted, _mean_losses, fit_adapters, mean_losses
from cluster.training.optimization import wsd
from cluster.training.passes import OnePass, Pass, arrange, summed_by_domain
from tests.lora.adapters import random_adapter
from tests.model.nano import logits, nano_model, random_ids
from tests.model.shapes import small_model
from tests.training.rows import nano_tokenizer, some_examples
from tests.training.runs import FolderRun, Stopped

TOKENIZER = nano_tokenizer()
_EXAMPLES = some_examples(TOKENIZER, 36)
EXAMPLES = {"law": _EXAMPLES[:14], "math": _EXAMPLES[14:24], "sql": _EXAMPLES[24:]}
SETTINGS = AdapterSettings(
    rank=3,
    alpha=6,
    num_steps=6,
    tokens_per_batch=128,
    tokens_per_pass=150,
    learning_rate=0.01,
    learned_loss=0.0,
    domains={
        # Stops after eight steps, when the mean over eight is there.
        "law": DomainAdapterSettings(rank=5, num_steps=11, learning_rate=0.005, alpha=4, learned_loss=1e3),
        "math": DomainAdapterSettings(targets=("q_proj", "down_proj"), tokens_per_batch=64),
    },
)
"""Three domains that differ in everything a domain may have of its own."""
STEPS = {"law": 8, "math": 6, "sql": 6}


def _base(model: PreTrainedModel) -> Base:
    return Base(model.requires_grad_(False), TOKENIZER, "0" * 16, "nano")


def _nano(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return nano_model(vocab_size=len(TOKENIZER)).to(dtype)


def _sliding() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).eval()


MODELS = {
    "zephyra": _nano,
    "biases": lambda: small_model("qwen2", tied=False),
    "another attention": _sliding,
}


def _fit(base: Base, folder: Path, names: tuple[str, ...] = tuple(EXAMPLES), **changes: Any) -> dict[str, Fitted]:
    settings = FitSettings(SETTINGS.model_copy(update=changes), seed=3, checkpoint_every_steps=100)
    return fit_adapters(base, {name: EXAMPLES[name] for name in names}, settings, FolderRun(folder / "run"))


class _WrittenOut(nn.Module):
    """`W x + scale * B A x`."""

    def __init__(self, base: nn.Linear, start: Factors) -> None:
        super().__init__()
        self.base, self.scale = base, start.scale
        self.a, self.b = (nn.Parameter(factor.clone()) for factor in (start.a_RI, start.b_OR))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.a.T) @ self.b.T


def _alone(model: PreTrainedModel, domain: str) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """One domain's factors (A, scale * B) and last loss, trained by itself: every document alone."""
    own = SETTINGS.of(domain)
    fresh = GroupedAdapters(model)
    fresh.add(domain, AdapterShape(own.rank, own.alpha, own.targets), seed=3)
    model = copy.deepcopy(model)
    layers = {}
    for name, start in fresh.weights(domain, "").factors.items():
        parent, _, child = name.rpartition(".")
        layers[name] = _WrittenOut(model.get_submodule(name), start)
        setattr(model.get_submodule(parent), child, layers[name])
    trained = [p for layer in layers.values() for p in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    plan = BatchPlan(EXAMPLES[domain], own.tokens_per_batch, 0, learn_prompts=False, seed=3)
    losses: list[float] = []
    for step in range(STEPS[domain]):
        examples = [example for row in plan.rows(step) for example in row]
        loss = sum((_summed_loss(model, e) for e in examples), start=torch.zeros(())) / _num_labels(examples)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained if p.grad is not None))
        for p in trained:
            assert p.grad is not None
            p.grad *= min(1.0, 1 / (norm + 1e-6))  # as torch clips
        for group in optimizer.param_groups:
            group["lr"] = own.learning_rate * wsd(step, own.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    factors = {name: (layer.a.detach(), layer.b.detach() * layer.scale) for name, layer in layers.items()}
    return factors, fmean(losses[-8:])


def _summed_loss(model: PreTrainedModel, example: Example) -> Tensor:
    ids = torch.tensor(example.ids)
    out_TV = model(input_ids=ids[None, :-1]).logits[0, example.num_prompt_tokens - 1 :]
    return nn.functional.cross_entropy(out_TV, ids[example.num_prompt_tokens :], reduction="sum")


def _num_labels(examples: list[Example]) -> int:
    return sum(len(example.ids) - example.num_prompt_tokens for example in examples)


def _assert_same(fitted: Fitted, factors: dict[str, tuple[Tensor, Tensor]], tolerance: float) -> None:
    assert fitted.weights.factors.keys() == factors.keys()
    for name, (a_RI, b_OR) in factors.items():
        got = fitted.weights.factors[name]
        torch.testing.assert_close(got.a_RI, a_RI, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got.b_OR * got.scale, b_OR, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_is_each_domain_alone(name: str, tmp_path: Path) -> None:
    model = MODELS[name]().double()
    assert takes_documents(model) == (name != "another attention")
    fitted = _fit(_base(model), tmp_path)
    for domain in EXAMPLES:
        factors, loss = _alone(model, domain)
        _assert_same(fitted[domain], factors, 1e-9)
        assert fitted[domain].loss == pytest.approx(loss, rel=1e-9)
        assert fitted[domain].num_steps == STEPS[domain]
        assert fitted[domain].weights.factors["model.layers.0.self_attn.q_proj"].rank == SETTINGS.of(domain).rank


def test_in_float32_it_is_the_same_but_for_rounding(tmp_path: Path) -> None:
    model = _nano()
    fitted = _fit(_base(model), tmp_path)
    for domain in EXAMPLES:
        factors, loss = _alone(model, domain)
        _assert_same(fitted[domain], factors, 1e-3)
        assert fitted[domain].loss == pytest.approx(loss, rel=1e-4)


def test_how_tokens_are_divided_into_passes_and_who_else_learns_changes_nothing(tmp_path: Path) -> None:
    base = _base(_nano(torch.float64))
    together = _fit(base, tmp_path)
    for index, changes in enumerate(({"tokens_per_pass": 64}, {"tokens_per_pass": 4096})):
        other = _fit(base, tmp_path / str(index), **changes)
        for domain, one in other.items():
            factors = one.weights.factors
            _assert_same(together[domain], {n: (f.a_RI, f.b_OR * f.scale) for n, f in factors.items()}, 1e-9)
    alone = _fit(base, tmp_path / "alone", ("sql",))["sql"].weights.factors
    _assert_same(together["sql"], {n: (f.a_RI, f.b_OR * f.scale) for n, f in alone.items()}, 1e-9)


def test_a_domain_that_breaks_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    """Bit for bit: the same products are made, with its numbers infinite or not."""
    base = _base(_nano())
    gradients = []
    for poison in (1.0, math.inf):
        adapters = GroupedAdapters(base.model)
        for seed, domain in enumerate(EXAMPLES):
            adapters.add_weights(domain, random_adapter(base.model, seed=seed))
        with torch.no_grad():
            adapters.parameter("math").mul_(poison)
        one_pass = OnePass(base.model, adapters)
        with one_pass.open():
            for batch in arrange(EXAMPLES, 10_000):
                one_pass.losses(batch).sum().backward()
        gradients.append({domain: adapters.parameter(domain).grad for domain in EXAMPLES})
    whole, broken = gradients
    assert torch.equal(broken["law"], whole["law"])
    assert torch.equal(broken["sql"], whole["sql"])
    assert whole["sql"].abs().max() > 0
    assert not torch.isfinite(broken["math"]).all()


def _breaking(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The loss of math is no number in its third batch, so many times."""
    counts = {"batches": 0}

    def poisoned(losses_M: Tensor, batch: Pass) -> dict[str, Tensor]:
        sums = summed_by_domain(losses_M, batch)
        if "math" in sums:
            counts["batches"] += 1
            if 3 <= counts["batches"] < 3 + times:
                sums["math"] = sums["math"] * math.nan
        return sums

    monkeypatch.setattr(one_pass_module, "summed_by_domain", poisoned)


def test_a_loss_that_is_no_number_takes_its_domain_back_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _base(_nano())
    settings = FitSettings(SETTINGS, seed=3, checkpoint_every_steps=2)
    whole = fit_adapters(base, EXAMPLES, settings, FolderRun(tmp_path / "whole"))
    _breaking(monkeypatch, times=1)
    run = FolderRun(tmp_path / "poisoned")
    poisoned = fit_adapters(base, EXAMPLES, settings, run)
    assert run.said == ["math: the loss of step 3 is no finite number; back to step 2, at 1/2 of the rate"]
    assert poisoned["math"].num_steps == STEPS["math"]
    assert _differ(poisoned["math"], whole["math"])
    for domain in ("law", "sql"):
        assert not _differ(poisoned[domain], whole[domain])
    # The halved rate is in the checkpoint.
    _breaking(monkeypatch, times=1)
    with pytest.raises(Stopped):
        fit_adapters(base, EXAMPLES, settings, FolderRun(tmp_path / "broken", stop_after=4))
    monkeypatch.undo()
    resumed = fit_adapters(base, EXAMPLES, settings, FolderRun(tmp_path / "broken"))
    assert not any(_differ(resumed[domain], poisoned[domain]) for domain in EXAMPLES)


def test_a_rate_that_cannot_be_ends_with_the_name_of_its_domain(tmp_path: Path) -> None:
    absurd = SETTINGS.domains["math"].model_copy(update={"learning_rate": 1e38})
    run = FolderRun(tmp_path / "run")
    settings = FitSettings(
        SETTINGS.model_copy(update={"domains": {**SETTINGS.domains, "math": absurd}}), 3, checkpoint_every_steps=100
    )
    with pytest.raises(InvalidInput, match="loss of math is no finite number at step"):
        fit_adapters(_base(_nano()), EXAMPLES, settings, run)
    assert [text.rpartition(" at ")[2] for text in run.said] == [f"1/{n} of the rate" for n in (2, 4, 8)]


def test_patience_ends_a_domain_at_its_best_weights_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _base(_nano())
    # One example that is learned by heart, and held-out ones that are soon forgotten over it.
    examples = {**EXAMPLES, "math": EXAMPLES["math"][:1]}
    held_out = {"math": EXAMPLES["sql"][:6], "sql": EXAMPLES["math"][:6]}
    own = {"num_steps": 60, "learning_rate": 0.03, "patience": 2}
    domains = {**SETTINGS.domains, "math": DomainAdapterSettings(**own)}
    adapters = SETTINGS.model_copy(update={"domains": domains, "validate_every_steps": 3})
    settings = FitSettings(adapters, seed=3, checkpoint_every_steps=4)
    measured: list[float] = []

    def keeps(*arguments: Any) -> dict[str, float]:
        losses = _mean_losses(*arguments)
        assert losses.keys() <= {"math"}, "only a domain with patience is measured"
        measured.extend(losses.values())
        return losses

    monkeypatch.setattr(one_pass_module, "_mean_losses", keeps)
    fitted = fit_adapters(base, examples, settings, FolderRun(tmp_path / "whole"), held_out)
    monkeypatch.undo()
    best = measured.index(min(measured))
    assert len(measured) == best + 3, "two were no better"
    assert fitted["math"].num_steps == 3 * len(measured) < 60
    weights = {"math": fitted["math"].weights}
    assert mean_losses(base, weights, {"math": held_out["math"]})["math"] == pytest.approx(min(measured), rel=1e-5)
    # The others do not notice; and a run that is killed goes the same way.
    without = adapters.model_copy(
        update={"domains": {**domains, "math": DomainAdapterSettings(**own | {"patience": None})}}
    )
    longer = fit_adapters(base, examples, FitSettings(without, 3, 4), FolderRun(tmp_path / "longer"), held_out)
    assert longer["math"].num_steps == 60
    assert not any(_differ(fitted[domain], longer[domain]) for domain in ("law", "sql"))
    with pytest.raises(Stopped):
        fit_adapters(base, examples, settings, FolderRun(tmp_path / "broken", stop_after=8), held_out)
    resumed = fit_adapters(base, examples, settings, FolderRun(tmp_path / "broken"), held_out)
    assert not any(_differ(resumed[domain], fitted[domain]) for domain in EXAMPLES)


def _differ(one: Fitted, other: Fitted) -> bool:
    factors = one.weights.factors
    return (one.num_steps, one.loss) != (other.num_steps, other.loss) or any(
        not torch.equal(f.a_RI, factors[n].a_RI) or not torch.equal(f.b_OR, factors[n].b_OR)
        for n, f in other.weights.factors.items()
    )


def test_a_fresh_adapter_is_the_plain_base_and_the_base_is_itself_again_after(tmp_path: Path) -> None:
    base = _base(_nano())
    base.model.get_input_embeddings().requires_grad_(True)
    kept, ids_BT = {name: p.clone() for name, p in base.model.named_parameters()}, random_ids(base.model, 2, 8)
    before_BTV = logits(base.model, ids_BT)
    attention, kinds = base.model.config._attn_implementation, [type(m) for m in base.model.modules()]
    fresh = GroupedAdapters(base.model)
    fresh.add("law", AdapterShape(rank=3, alpha=6.0), seed=0)
    assert mean_losses(base, {"law": fresh.weights("law", "0" * 16)}, EXAMPLES) == mean_losses(base, {}, EXAMPLES)
    _fit(base, tmp_path)
    assert torch.equal(logits(base.model, ids_BT), before_BTV)
    assert all(torch.equal(p, kept[name]) for name, p in base.model.named_parameters())
    assert (base.model.config._attn_implementation, [type(m) for m in base.model.modules()]) == (attention, kinds)
    assert [name for name, p in base.model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("stop_after", [2, 8])
def test_killed_and_resumed_is_unbroken_bit_for_bit(stop_after: int, tmp_path: Path) -> None:
    base = _base(_nano())
    settings = FitSettings(SETTINGS, seed=3, checkpoint_every_steps=2)
    whole = fit_adapters(base, EXAMPLES, settings, FolderRun(tmp_path / "whole"))
    with pytest.raises(Stopped):
        fit_adapters(base, EXAMPLES, settings, FolderRun(tmp_path / "broken", stop_after))
    resumed = fit_adapters(base, EXAMPLES, settings, FolderRun(tmp_path / "broken"))
    for domain, one in whole.items():
        other = resumed[domain]
        assert (other.num_steps, other.loss) == (one.num_steps, one.loss)
        for name, f in one.weights.factors.items():
            assert torch.equal(other.weights.factors[name].a_RI, f.a_RI)
            assert torch.equal(other.weights.factors[name].b_OR, f.b_OR)


def test_losses_are_those_of_each_document_through_its_own_adapter(tmp_path: Path) -> None:
    base = _base(_nano(torch.float64))
    adapters = {d: random_adapter(base.model, (2, 4), seed, torch.float64) for seed, d in enumerate(("law", "sql"))}
    got = mean_losses(base, adapters, EXAMPLES, tokens_per_pass=100)
    for domain, examples in EXAMPLES.items():
        model = copy.deepcopy(base.model)
        weights: AdapterWeights | None = adapters.get(domain)
        for name, layer in adaptable_layers(model).items():
            if weights is not None:
                layer.weight += weights.factors[name].scale * weights.factors[name].b_OR @ weights.factors[name].a_RI
        with torch.no_grad():
            expected = sum(float(_summed_loss(model, e)) for e in examples) / _num_labels(examples)
        assert got[domain] == pytest.approx(expected, rel=1e-9)


def test_a_target_that_the_base_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"adapter of law is to change gate_proj, which this base lacks.*up_proj"):
        _fit(_base(_nano()), tmp_path, ("law",), domains={"law": DomainAdapterSettings(targets=("gate_proj",))})
