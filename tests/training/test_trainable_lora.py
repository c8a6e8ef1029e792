"""Adapters in training against serving, against merged weights, and against finite differences."""

import copy

import pytest
import torch
from torch import Tensor

from cluster.lora.delta import dense_delta
from cluster.lora.linear import attach_mixed_batch
from cluster.lora.weights import AdapterWeights, adaptable_layers
from cluster.messages import AdapterRef, Mixture
from cluster.model import ZephyraFusionForCausalLM
from cluster.training.optimization import Optimizer
from cluster.training.trainable_lora import TrainableAdapters
from tests.lora.adapters import FINGERPRINT, mixed_logits, random_adapter
from tests.model.nano import logits, nano_model, random_ids

DOMAINS = ("law", "math", "sql")


def _adapters(plain: ZephyraFusionForCausalLM, seed: int) -> dict[str, AdapterWeights]:
    """Random adapters of different ranks; one of them changes only some layers."""
    ranks = {"law": (3,), "math": (2, 5), "sql": (4,)}
    adapters = {d: random_adapter(plain, ranks[d], seed * 3 + i) for i, d in enumerate(DOMAINS)}
    kept = {name: f for name, f in adapters["sql"].factors.items() if name.endswith(("q_proj", "up_proj", "down_proj"))}
    return {**adapters, "sql": AdapterWeights(kept, FINGERPRINT)}


def _system(seed: int = 0) -> tuple[ZephyraFusionForCausalLM, ZephyraFusionForCausalLM, TrainableAdapters]:
    """A plain model, its copy under adapters, and the adapters, with random non-zero factors."""
    plain = nano_model(seed).requires_grad_(False)
    model = copy.deepcopy(plain)
    adapters = TrainableAdapters(model, _adapters(plain, seed))
    return plain, model, adapters


def _merged_logits(
    plain: ZephyraFusionForCausalLM, mixture: dict[str, float], a: TrainableAdapters, x: Tensor
) -> Tensor:
    """Logits of a model whose weights are those of `plain` plus the mixture's dense delta."""
    merged = copy.deepcopy(plain)
    every = {domain: a.weights(domain, FINGERPRINT) for domain in mixture}
    for name, layer in adaptable_layers(merged).items():
        changing = [domain for domain, w in every.items() if name in w.factors]
        factors = [every[domain].factors[name] for domain in changing]
        scaled = [(f.a_RI, f.b_OR * f.scale) for f in factors]
        layer.weight += dense_delta(scaled, [mixture[domain] for domain in changing]).float()
    return logits(merged, x)


@pytest.mark.parametrize("domain", DOMAINS)
def test_one_domain_answers_as_in_serving_and_as_merged(domain: str) -> None:
    plain, model, adapters = _system()
    ids_BT = random_ids(plain, 2, 8)
    adapters.select(domain)
    selected_BTV = logits(model, ids_BT)
    one_hot_BN = torch.tensor([[float(name == domain) for name in DOMAINS]] * 2)
    adapters.mix(one_hot_BN, ids_BT.shape[1])
    served_BTV = mixed_logits(plain, adapters.weights(domain, FINGERPRINT), ids_BT)
    assert (selected_BTV - logits(plain, ids_BT)).abs().max() > 0.1, "the adapter was meant to matter"
    for other_BTV in (logits(model, ids_BT), served_BTV, _merged_logits(plain, {domain: 1.0}, adapters, ids_BT)):
        torch.testing.assert_close(other_BTV, selected_BTV, rtol=1e-5, atol=1e-5)
    adapters.select(None)
    assert torch.equal(logits(model, ids_BT), logits(plain, ids_BT))


def test_each_row_of_a_soft_mixture_answers_as_in_serving_and_as_merged() -> None:
    plain, model, adapters = _system()
    ids_BT = random_ids(plain, 3, 8)
    weights_BN = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.125], [0.0, 0.0, 0.0]])
    adapters.mix(weights_BN, ids_BT.shape[1])
    got_BTV = logits(model, ids_BT)
    served = copy.deepcopy(plain)
    batch = attach_mixed_batch(served)
    resident = {AdapterRef(domain, 1): adapters.weights(domain, FINGERPRINT) for domain in DOMAINS}
    rows = [dict(zip(DOMAINS, row, strict=True)) for row in weights_BN.tolist()]
    mixtures = [
        Mixture.of({AdapterRef(d, 1): w for d, w in row.items()}) if any(row.values()) else Mixture() for row in rows
    ]
    batch.set_rows(mixtures, [ids_BT.shape[1]] * len(ids_BT), resident)
    torch.testing.assert_close(got_BTV, logits(served, ids_BT), rtol=1e-5, atol=1e-5)
    for index, row in enumerate(rows):
        merged_BTV = _merged_logits(plain, row, adapters, ids_BT[index : index + 1])
        torch.testing.assert_close(got_BTV[index : index + 1], merged_BTV, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_mixture_weights_is_that_of_finite_differences() -> None:
    plain, model, adapters = _system()
    model.double()
    ids_BT = random_ids(plain, 2, 6)

    def loss(weights_BN: Tensor) -> Tensor:
        adapters.mix(weights_BN, ids_BT.shape[1])
        out: Tensor = model(input_ids=ids_BT, labels=ids_BT).loss
        return out

    weights_BN = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.05]], dtype=torch.float64, requires_grad=True)
    (gradient_BN,) = torch.autograd.grad(loss(weights_BN), weights_BN)
    step = 1e-3
    for row in range(2):
        for column in range(3):
            ahead, behind = weights_BN.detach().clone(), weights_BN.detach().clone()
            ahead[row, column] += step
            behind[row, column] -= step
            with torch.no_grad():
                slope = float(loss(ahead) - loss(behind)) / (2 * step)
            # The bottleneck is fp32 by design: its rounding, over 2 * step, bounds the agreement.
            assert float(gradient_BN[row, column]) == pytest.approx(slope, rel=1e-3, abs=1e-3)
    assert gradient_BN.abs().min() > 1e-3, "each weight was meant to matter"


def _factors(adapters: TrainableAdapters, domain: str) -> dict[str, Tensor]:
    return {name: factor.detach().clone() for name, factor in adapters.parameters(domain).items()}


def test_training_one_domain_leaves_the_others_and_the_base_as_they_are() -> None:
    plain, model, adapters = _system()
    before = {domain: _factors(adapters, domain) for domain in DOMAINS}
    optimizers = {domain: Optimizer(adapters.parameters(domain), 0.01, 5, 0.1) for domain in DOMAINS}
    ids_BT = random_ids(plain, 2, 8)
    losses = []
    for step in range(5):
        adapters.select("math")
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        for optimizer in optimizers.values():  # the others' too: no gradient, no change, not even decay
            optimizer.step(step)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for domain in DOMAINS:
        after = _factors(adapters, domain)
        changed = {name for name, factor in before[domain].items() if not torch.equal(factor, after[name])}
        assert changed == (set(after) if domain == "math" else set())
    adapters.select(None)
    assert torch.equal(logits(model, ids_BT), logits(plain, ids_BT))


def test_what_was_given_is_what_is_published_and_a_copy() -> None:
    plain, model, adapters = _system()
    given = _adapters(plain, 0)
    for domain in DOMAINS:
        published = adapters.weights(domain, FINGERPRINT)
        assert published.factors.keys() == given[domain].factors.keys()
        for name, f in given[domain].factors.items():
            kept = published.factors[name]
            assert torch.equal(kept.a_RI, f.a_RI)
            assert torch.equal(kept.b_OR, f.b_OR)
            assert kept.scale == f.scale
    ids_BT = random_ids(plain, 1, 6)
    adapters.select("law")
    before_BTV = logits(model, ids_BT)
    with torch.no_grad():
        given["law"].factors["model.layers.0.mlp.up_proj"].a_RI.zero_()
        adapters.weights("law", FINGERPRINT).factors["model.layers.0.mlp.up_proj"].a_RI.zero_()
    assert torch.equal(logits(model, ids_BT), before_BTV)
