"""The native decoder against the model's own forward pass, in fp32 and bf16, in any chunks, with any mixtures."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.kernels import library as native
from cluster.kernels.decoder import BLOCK_TOKENS, NativeDecoder, StepInput, native_decoder, why_not_native
from cluster.lora.delta import dense_delta
from cluster.lora.native_mixture import NativeAdapter, native_mixtures
from cluster.lora.weights import AdapterWeights, Factors, adaptable_layers
from cluster.messages import AdapterRef, Mixture
from cluster.model.quantization import quantize_model, weight_bytes
from tests.kernels.conftest import OLDER
from tests.kernels.shapes import KINDS, make_model

MAX_TOKENS = 96
NUM_BLOCKS = 32

VARIED = ("zephyra", "zephyra_gated", "qwen2")
"""Older machines need not have every kind: these have both activations, biases or none, queries and keys with norms and
without, and widths that fit vectors and that do not."""

every_kind = pytest.mark.parametrize(
    ("library", "kind"),
    [*(("native", kind) for kind in KINDS), *((older, kind) for older in OLDER for kind in VARIED)],
    indirect=["library"],
)


def decoder_of(library: ctypes.CDLL, kind: str, dtype: torch.dtype = torch.float32) -> NativeDecoder:
    return NativeDecoder(make_model(kind, dtype), library, MAX_TOKENS, NUM_BLOCKS)


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def step_input(rows: list[tuple[list[int], int, list[int]]]) -> StepInput:
    """A step over (new tokens, where they start, blocks) of each sequence; all logits are wanted."""
    lengths = [len(ids) for ids, _, _ in rows]
    width = max(len(blocks) for _, _, blocks in rows)
    return StepInput(
        np.array([token for ids, _, _ in rows for token in ids], dtype=np.int64),
        np.array([p for ids, start, _ in rows for p in range(start, start + len(ids))], dtype=np.int64),
        np.repeat(np.arange(len(rows), dtype=np.int64), lengths),
        np.array([blocks + [0] * (width - len(blocks)) for _, _, blocks in rows], dtype=np.int64),
        np.arange(sum(lengths), dtype=np.int64),
    )


def plain(decoder: NativeDecoder, rows: list[tuple[list[int], int, list[int]]]) -> Tensor:
    return decoder.run(step_input(rows), native.Mixtures())


@every_kind
def test_logits_are_the_models_own(library, kind):
    ids = ids_of(53)
    expected = make_model(kind)(torch.tensor([ids])).logits[0]
    got = plain(decoder_of(library, kind), [(ids, 0, [7, 3, 12, 0])])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@every_kind
def test_logits_in_bf16_differ_by_rounding_only(library, kind):
    ids = ids_of(53)
    exact = make_model(kind, torch.bfloat16).float()(torch.tensor([ids])).logits[0]
    rounded = make_model(kind, torch.bfloat16)(torch.tensor([ids])).logits[0].float()
    got = plain(decoder_of(library, kind, torch.bfloat16), [(ids, 0, [7, 3, 12, 0])])
    # Not further from the exact result than transformers' own pass, which rounds more often.
    assert (got - exact).norm() < 1.1 * (rounded - exact).norm()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_schedule_gives_the_same_bits(library, kind, dtype, data):
    """However prompts are cut into chunks, and whatever is beside them in a step."""
    decoder = decoder_of(library, kind, dtype)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    prompts = [ids_of(length, seed) for seed, length in enumerate(lengths)]
    free = data.draw(st.permutations(range(NUM_BLOCKS)))
    blocks = [[free.pop() for _ in range(-(-length // BLOCK_TOKENS))] for length in lengths]
    alone = [plain(decoder, [(ids, 0, own)]) for ids, own in zip(prompts, blocks, strict=True)]
    done = [0] * len(prompts)
    parts: list[list[Tensor]] = [[] for _ in prompts]
    while any(start < length for start, length in zip(done, lengths, strict=True)):
        left = [index for index, length in enumerate(lengths) if done[index] < length]
        chosen = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        sizes = [data.draw(st.integers(1, lengths[index] - done[index])) for index in chosen]
        rows = [
            (prompts[i][done[i] : done[i] + size], done[i], blocks[i]) for i, size in zip(chosen, sizes, strict=True)
        ]
        for index, size, logits in zip(chosen, sizes, plain(decoder, rows).split(sizes), strict=True):
            parts[index].append(logits)
            done[index] += size
    assert all(torch.equal(torch.cat(part), whole) for part, whole in zip(parts, alone, strict=True))


def adapter(kind: str, seed: int, ranks: tuple[int, ...], skip: int = 0) -> AdapterWeights:
    """Random factors whose ranks take turns; every `skip`-th layer is left alone."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for index, (name, layer) in enumerate(adaptable_layers(make_model(kind)).items()):
        if skip and index % skip == 0:
            continue
        rank = ranks[index % len(ranks)]
        a_RI = torch.randn(rank, layer.in_features, generator=generator) * 0.2
        b_OR = torch.randn(layer.out_features, rank, generator=generator) * 0.2
        factors[name] = Factors(a_RI, b_OR, 0.25 + 0.5 * (index % 3))
    return AdapterWeights(factors, "0" * 16)


def merged(
    kind: str, parts: dict[AdapterRef, AdapterWeights], mixture: Mixture, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """In fp32, of a base and factors that were rounded to `dtype`."""
    model = make_model(kind, dtype).float()
    for name, layer in adaptable_layers(model).items():
        present = [(parts[ref].factors[name], weight) for ref, weight in mixture.entries if name in parts[ref].factors]
        factors = [(f.a_RI.to(dtype).float(), f.scale * f.b_OR.to(dtype).float()) for f, _ in present]
        delta = dense_delta(factors, [weight for _, weight in present])
        layer.weight.copy_((layer.weight.double() + delta).float())
    return model


A, B, C = (AdapterRef(name, 1) for name in "abc")
MIXTURES = (
    Mixture(),
    Mixture.of({A: 1.0}),
    Mixture.of({A: 0.5, B: 0.25, C: 0.25}),
    Mixture.of({C: 1.0}),
    Mixture.of({A: 1.0}),
    Mixture.of({B: 2.0, C: 0.5}),
)


@every_kind
def test_each_row_meets_its_own_mixture_exactly(library, kind):
    weights = {A: adapter(kind, 1, (4,)), B: adapter(kind, 2, (1, 9, 3), skip=3), C: adapter(kind, 3, (17, 2), skip=2)}
    decoder = decoder_of(library, kind)
    resident = {ref: NativeAdapter(w, decoder.sites, torch.float32, decoder.library) for ref, w in weights.items()}
    lengths = [5, 11, 1, 21, 2, 7]
    rows = [(ids_of(length, seed), 0, [2 * seed, 2 * seed + 1]) for seed, length in enumerate(lengths)]
    got = decoder.run(step_input(rows), native_mixtures(MIXTURES, lengths, resident).struct).split(lengths)
    for mixture, (ids, _, _), logits in zip(MIXTURES, rows, got, strict=True):
        expected = merged(kind, weights, mixture)(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    alone = plain(decoder, [(rows[0][0], 0, [20, 21])])
    assert torch.equal(got[0], alone), "a row of the plain base is not touched"


@every_kind
def test_mixtures_in_bf16_differ_by_rounding_only(library, kind):
    weights = {A: adapter(kind, 1, (4,)), B: adapter(kind, 2, (1, 9, 3), skip=3), C: adapter(kind, 3, (17, 2), skip=2)}
    decoder = decoder_of(library, kind, torch.bfloat16)
    resident = {ref: NativeAdapter(w, decoder.sites, torch.bfloat16, decoder.library) for ref, w in weights.items()}
    lengths = [5, 11, 1, 21, 2, 7]
    rows = [(ids_of(length, seed), 0, [2 * seed, 2 * seed + 1]) for seed, length in enumerate(lengths)]
    got = decoder.run(step_input(rows), native_mixtures(MIXTURES, lengths, resident).struct).split(lengths)
    for mixture, (ids, _, _), logits in zip(MIXTURES, rows, got, strict=True):
        model = merged(kind, weights, mixture, torch.bfloat16)
        exact = model(torch.tensor([ids])).logits[0]
        rounded = model.bfloat16()(torch.tensor([ids])).logits[0].float()
        # Nearer than one pass of the merged model in bf16, whose weights are rounded once more.
        assert (logits - exact).norm() < (rounded - exact).norm()


def test_a_resident_adapter_takes_what_its_factors_take(library):
    weights = adapter("llama", 5, (4,))
    decoder = decoder_of(library, "llama", torch.bfloat16)
    resident = NativeAdapter(weights, decoder.sites, torch.bfloat16, decoder.library)
    exact = weights.num_bytes // 2
    assert exact <= resident.num_bytes < 1.6 * exact  # outputs come in groups of 64, here of 12 to 100


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@every_kind
def test_a_decoder_takes_its_models_weights_over_when_it_is_told_to(library, kind, quantization):
    model = make_model(kind)
    if quantization:
        quantize_model(model, quantization)
    before = weight_bytes(model)
    decoder = NativeDecoder(model, library, MAX_TOKENS, NUM_BLOCKS)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    ids = ids_of(20)
    logits = plain(decoder, [(ids, 0, [1, 2])])
    decoder.take_over()
    left = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    assert left < before / 10  # norms, biases and angles
    assert torch.equal(plain(decoder, [(ids, 0, [1, 2])]), logits)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@every_kind
def test_a_quantized_base_answers_as_its_integers_say(library, kind, quantization):
    model = make_model(kind)
    quantize_model(model, quantization)
    ids = ids_of(53)
    expected = model(torch.tensor([ids])).logits[0]
    got = plain(NativeDecoder(model, library, MAX_TOKENS, NUM_BLOCKS), [(ids, 0, [7, 3, 12, 0])])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_is_recognised_and_proven(kind):
    assert why_not_native(make_model(kind)) is None
    assert native_decoder(make_model(kind), MAX_TOKENS, NUM_BLOCKS) is not None


def test_what_looks_alike_but_computes_otherwise_is_found_out_and_left_whole():
    model = make_model("llama")
    ids = torch.tensor([ids_of(20)])
    model.model.layers[2].self_attn.register_forward_hook(lambda module, args, output: (output[0] * 1.5, output[1]))
    before = model(ids).logits
    assert why_not_native(model) is None
    assert native_decoder(model, MAX_TOKENS, NUM_BLOCKS) is None
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.half(), "float16"),
        (lambda model: model.model.layers[1].add_module("extra", torch.nn.Linear(2, 2)), "other parts"),
        (lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.GELU()), "other layers"),
        (lambda model: setattr(model.model.rotary_emb, "rope_type", "dynamic"), "dynamic"),
    ],
)
def test_what_the_kernels_do_not_know_is_said(change, why):
    model = make_model("llama")
    change(model)
    assert why in (why_not_native(model) or "")
    assert native_decoder(model, MAX_TOKENS, NUM_BLOCKS) is None
