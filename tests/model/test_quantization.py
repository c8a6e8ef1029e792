"""Quantized matrices against the slow formula, and models of them against the float weights they stand for."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cluster.errors import CorruptArtifact, IncompatibleAdapter, InvalidInput
from cluster.lora.delta import dense_delta
from cluster.lora.linear import attach_mixed_batch
from cluster.lora.weights import AdapterWeights, adaptable_layers
from cluster.messages import AdapterRef, Mixture
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM
from cluster.model.configuration_zephyra import SIZES
from cluster.model.quantization import (
    MAX_PACKED_ROWS,
    QuantizedLinear,
    QuantizedMatrix,
    int8_product,
    num_weights,
    pack_int4,
    quantize_int4,
    quantize_int8,
    quantize_model,
    unpack_int4,
    weight_bytes,
)
from tests.lora.adapters import FINGERPRINT, random_adapter
from tests.model.nano import logits, nano_model, random_ids
from tests.model.shapes import with_dequantized_weights

LAW, SQL = AdapterRef("law", 1), AdapterRef("sql", 3)
WEIGHTS = {LAW: 0.75, SQL: 0.5}

both = pytest.mark.parametrize("quantization", ["int8", "int4"])


def _random(shape: tuple[int, int], seed: int, spread: float) -> Tensor:
    """Normal weights whose rows differ in size by up to 10 ** spread either way; one row is zero."""
    generator = torch.Generator().manual_seed(seed)
    exponents = (torch.rand(shape[0], 1, generator=generator) * 2 - 1) * spread
    weight_OI = torch.randn(shape, generator=generator) * 10**exponents
    weight_OI[seed % shape[0]] = 0
    return weight_OI


def _matrices(largest_spread: float) -> st.SearchStrategy[tuple[int, int, int, float]]:
    """Rows, groups of 32 inputs, seed and spread of a random matrix."""
    spreads = st.sampled_from([0.0, 3.0, largest_spread])
    return st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31), spreads)


@settings(deadline=None, max_examples=60)
@given(_matrices(largest_spread=30.0))
def test_no_int8_weight_is_off_by_more_than_half_its_scale(matrix: tuple[int, int, int, float]) -> None:
    rows, groups, seed, spread = matrix
    weight_OI = _random((rows, groups * 32 - seed % 32), seed, spread)
    values_OI, scales_O = quantize_int8(weight_OI)
    assert (values_OI.dtype, scales_O.dtype) == (torch.int8, torch.bfloat16)
    assert int(values_OI.min()) >= -127
    off_OI = (values_OI.double() * scales_O.double()[:, None] - weight_OI.double()).abs()
    assert (off_OI <= scales_O.double()[:, None] / 2 * (1 + 1e-6)).all()


@settings(deadline=None, max_examples=60)
@given(_matrices(largest_spread=15.0))  # whose squares are still fp32 numbers: errors are compared as such
def test_every_int4_weight_has_the_nearest_value_and_no_group_is_worse_than_rounded(
    matrix: tuple[int, int, int, float],
) -> None:
    rows, groups, seed, spread = matrix
    weight_OI = _random((rows, groups * 32), seed, spread)
    values_OI, scales_OG = quantize_int4(weight_OI)
    assert (values_OI.dtype, scales_OG.dtype, scales_OG.shape) == (torch.int8, torch.bfloat16, (rows, groups))
    per_weight_OI = scales_OG.double().repeat_interleave(32, dim=1)
    off_OI = (values_OI * per_weight_OI - weight_OI.double()).abs()
    levels = torch.arange(-8, 8, dtype=torch.float64)
    least_OI = (levels * per_weight_OI[..., None] - weight_OI.double()[..., None]).abs().amin(-1)
    assert (off_OI <= least_OI + per_weight_OI.abs() * 1e-6).all()
    rounded_OI = _rounded_to_int4(weight_OI.double())
    ours_OG, plain_OG = (
        (off.square().view(rows, groups, 32).sum(-1)) for off in (off_OI, (rounded_OI - weight_OI.double()).abs())
    )
    assert (ours_OG <= plain_OG * (1 + 1e-3)).all()


def _rounded_to_int4(weight_OI: Tensor) -> Tensor:
    """Plain rounding, one group at a time: the largest weight of a group becomes -8 times a bf16 scale."""
    out_OI = torch.zeros_like(weight_OI)
    for o in range(weight_OI.shape[0]):
        for start in range(0, weight_OI.shape[1], 32):
            group = weight_OI[o, start : start + 32]
            scale = (group[group.abs().argmax()] / -8).bfloat16().double()
            if scale != 0:
                out_OI[o, start : start + 32] = (group / scale).round().clamp(-8, 7) * scale
    return out_OI


def test_int4_is_better_than_rounding_on_normal_weights() -> None:
    weight_OI = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    values_OI, scales_OG = quantize_int4(weight_OI)
    ours_OI = values_OI * scales_OG.float().repeat_interleave(32, dim=1)
    ours, plain = (float((w - weight_OI).norm()) for w in (ours_OI, _rounded_to_int4(weight_OI)))
    assert ours < 0.96 * plain


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_two_int4_values_share_a_byte_as_documented(rows: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values_OI = torch.randint(-8, 8, (rows, 2 * pairs), generator=generator, dtype=torch.int8)
    packed_OP = pack_int4(values_OI)
    assert torch.equal(unpack_int4(packed_OP), values_OI)
    for o in range(rows):
        for p in range(pairs):
            low, high = int(values_OI[o, 2 * p]) + 8, int(values_OI[o, 2 * p + 1]) + 8
            assert int(packed_OP[o, p]) == low + 16 * high


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, MAX_PACKED_ROWS + 4),
    st.integers(1, 70),
    st.one_of(st.integers(1, 130), st.sampled_from([32, 64, 96])),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_an_int8_product_is_that_of_the_dequantized_matrix(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, seed: int
) -> None:
    values_OI, scales_O = quantize_int8(_random((outputs, inputs), seed, 2.0))
    x_TI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y_TO = int8_product(x_TI, values_OI, scales_O)
    assert (y_TO.dtype, y_TO.shape) == (dtype, (rows, outputs))
    weight_OI = values_OI.double() * scales_O.double()[:, None]
    most_TO = x_TI.double().abs() @ weight_OI.abs().T
    assert ((y_TO.double() - x_TI.double() @ weight_OI.T).abs() <= 4 * torch.finfo(dtype).eps * most_TO).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_layer_is_off_by_no_more_than_its_scales_allow(quantization: str, dtype: torch.dtype) -> None:
    model = nano_model(feed_forward="swiglu").to(dtype)
    quantized = copy.deepcopy(model)
    quantize_model(quantized, quantization)
    layers = adaptable_layers(model)
    assert len(layers) == 2 * 7
    for name, linear in layers.items():
        layer = quantized.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        x_TI = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        off_TO = (layer(x_TI).float() - linear(x_TI).float()).abs()
        scales = layer.matrix.scales.float().abs()
        # int8 rounds to half a scale; int4 may also cut a group's far end, by a whole scale and a little.
        per_weight_OI = scales[:, None] / 2 if quantization == "int8" else scales.repeat_interleave(32, dim=1) * 1.5
        rounding_TO = 4 * torch.finfo(dtype).eps * (x_TI.float().abs() @ linear.weight.float().abs().T)
        assert (off_TO <= x_TI.float().abs() @ per_weight_OI.expand_as(linear.weight).T + rounding_TO).all()
        assert float(off_TO.max()) > 0, "the bound is not met by leaving the layer as it was"


@both
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_what_its_dequantized_weights_do(quantization: str, tied: bool) -> None:
    model = nano_model(tie_word_embeddings=tied)
    quantized = copy.deepcopy(model)
    quantize_model(quantized, quantization)
    ids_BT = random_ids(model, 2, 30)
    expected_BTV = logits(with_dequantized_weights(model, quantized), ids_BT)
    torch.testing.assert_close(logits(quantized, ids_BT), expected_BTV, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected_BTV, logits(model, ids_BT), rtol=1e-4, atol=1e-4)


def test_a_tied_head_stays_tied_wherever_the_model_goes() -> None:
    model = nano_model()
    float_weights = model.num_parameters()
    quantize_model(model, "int8")
    before = weight_bytes(model)
    moved = copy.deepcopy(model).to(torch.bfloat16)
    for place in (model, moved):
        assert place.lm_head.matrix is place.model.embed_tokens.matrix
        assert num_weights(place) == float_weights
    assert moved.model.embed_tokens(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    assert weight_bytes(moved) < before


@pytest.mark.parametrize("size", sorted(SIZES.keys() - {"nano"}))
@pytest.mark.parametrize("feed_forward", ["relu2", "swiglu"])
def test_memory_in_bf16(size: str, feed_forward: str) -> None:
    with torch.device("meta"):
        config = ZephyraFusionConfig(**SIZES[size], feed_forward=feed_forward)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    shares = {}
    for quantization in ("int8", "int4"):
        quantized = copy.deepcopy(model)
        quantize_model(quantized, quantization, QuantizedMatrix.unfilled)
        shares[quantization] = weight_bytes(quantized) / weight_bytes(model)
    assert shares["int8"] <= 0.55
    # Embeddings are int8 at both widths: the smaller the model, the more of it they are.
    assert shares["int4"] <= 0.36


def test_an_input_that_is_no_multiple_of_32_keeps_eight_bits() -> None:
    model = nano_model(intermediate_size=80)
    quantize_model(model, "int4")
    bits = {name.rpartition(".")[2]: layer.matrix.bits for name, layer in adaptable_layers(model).items()}
    assert bits == {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "up_proj": 4, "down_proj": 8}


@both
@pytest.mark.parametrize("feed_forward", ["relu2", "swiglu"])
def test_adapters_fit_and_add_what_they_add_to_the_dequantized_weights(quantization: str, feed_forward: str) -> None:
    model = nano_model(feed_forward=feed_forward)
    quantized = copy.deepcopy(model)
    quantize_model(quantized, quantization)
    assert list(adaptable_layers(quantized)) == list(adaptable_layers(model))
    adapters = {LAW: random_adapter(model, ranks=(4, 1, 7)), SQL: random_adapter(model, seed=1)}
    wide = nano_model(feed_forward=feed_forward, hidden_size=96)
    quantize_model(wide, quantization)
    for adapter in adapters.values():
        adapter.check_fits(adaptable_layers(quantized), FINGERPRINT)
        with pytest.raises(IncompatibleAdapter, match="the layer needs A"):
            adapter.check_fits(adaptable_layers(wide), FINGERPRINT)
    ids_BT = random_ids(model, 2, 20)
    expected_BTV = _merged_logits(with_dequantized_weights(model, quantized), adapters, ids_BT)
    batch = attach_mixed_batch(quantized)
    batch.set_rows([Mixture.of(WEIGHTS)] * 2, [20, 20], adapters)
    torch.testing.assert_close(logits(quantized, ids_BT), expected_BTV, rtol=1e-4, atol=1e-4)
    batch.set_rows([Mixture()] * 2, [20, 20], adapters)
    assert not torch.allclose(expected_BTV, logits(quantized, ids_BT), rtol=1e-2, atol=1e-2)


def _merged_logits(
    model: ZephyraFusionForCausalLM, adapters: dict[AdapterRef, AdapterWeights], ids_BT: Tensor
) -> Tensor:
    """Logits of the float `model` with the mixture merged into its weights."""
    with torch.no_grad():
        for name, linear in adaptable_layers(model).items():
            parts = [adapters[ref].factors[name] for ref in WEIGHTS]
            factors = [(part.a_RI, part.b_OR * part.scale) for part in parts]
            linear.weight += dense_delta(factors, list(WEIGHTS.values())).float()
    return logits(model, ids_BT)


class _ScaledEmbedding(nn.Embedding):
    """As some architectures have: looks up, then multiplies."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 8


def test_what_cannot_be_quantized_is_refused() -> None:
    model = nano_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(CorruptArtifact, match="hold NaN or infinity"):
        quantize_model(model, "int4")
    scaled = nano_model()
    scaled.model.embed_tokens = _ScaledEmbedding(512, 64)
    with pytest.raises(InvalidInput, match=r"model\.embed_tokens is a _ScaledEmbedding"):
        quantize_model(scaled, "int8")
    twice = nano_model()
    quantize_model(twice, "int8")
    with pytest.raises(InvalidInput, match="quantized already"):
        quantize_model(twice, "int4")
