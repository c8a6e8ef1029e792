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
from tests.lora.adapters import FINGERPRINT, mixed_logits
from tests.model.nano import logits, nano_model, random_ids

DOMAINS = ("law", "math", "sql")


def _system(seed: int = 0) -> tuple[ZephyraFusionForCausalLM, ZephyraFusionForCausalLM, TrainableAdapters]:
    """A plain model, its copy under adapters, and the adapters, with random non-zero factors."""
    plain = nano_model(seed).requires_grad_(False)
    model = copy.deepcopy(plain)
    adapters = TrainableAdapters(model, DOMAINS, rank=3, alpha=6.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for domain in DOMAINS:
            for factor in adapters.parameters(domain).values():
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.15)
    return plain, model, adapters


def _merged_logits(
    plain: ZephyraFusionForCausalLM, mixture: dict[str, float], a: TrainableAdapters, x: Tensor
) -> Tensor:
    """Logits of a model whose weights are those of `plain` plus the mixture's dense delta."""
    merged = copy.deepcopy(plain)
    every = {domain: a.weights(domain, FINGERPRINT) for domain in mixture}
    for name, layer in adaptable_layers(merged).items():
        factors = [(w.factors[name].a_RI, w.factors[name].b_OR * w.factors[name].scale) for w in every.values()]
        layer.weight += dense_delta(factors, list(mixture.values())).float()
    return logits(merged, x)


def test_a_fresh_adapter_is_the_plain_base_bit_for_bit() -> None:
    plain = nano_model()
    model = copy.deepcopy(plain)
    adapters = TrainableAdapters(model, DOMAINS, rank=3, alpha=6.0, seed=0)
    ids_BT = random_ids(plain, 2, 6)
    adapters.select("law")
    assert torch.equal(logits(model, ids_BT), logits(plain, ids_BT))


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


def test_what_was_published_is_what_is_loaded() -> None:
    plain, model, adapters = _system()
    _, other_model, others = _system(seed=1)
    published = adapters.weights("law", FINGERPRINT)
    rescaled = AdapterWeights(
        {name: type(f)(f.a_RI, f.b_OR * 4, f.scale / 4) for name, f in published.factors.items()}, FINGERPRINT
    )
    ids_BT = random_ids(plain, 1, 6)
    adapters.select("law")
    for weights in (published, rescaled):
        others.load("math", weights)
        expected = adapters.weights("law", FINGERPRINT).factors
        got = others.weights("math", FINGERPRINT).factors
        assert all(
            torch.equal(got[name].b_OR, f.b_OR) and torch.equal(got[name].a_RI, f.a_RI) for name, f in expected.items()
        )
    with torch.no_grad():
        published.factors["model.layers.0.mlp.up_proj"].a_RI.zero_()
    torch.testing.assert_close(
        logits(model, ids_BT), _merged_logits(plain, {"law": 1.0}, adapters, ids_BT), rtol=1e-5, atol=1e-5
    )
    assert other_model is not model
