"""Merged mixtures against the exact sum: the bound is never below the error and hardly above, the error the least."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import IncompatibleAdapter, InvalidInput, InvalidMixture
from cluster.lora.certificate import Certificate, in_total
from cluster.lora.linear import attach_mixed_batch
from cluster.lora.merging import Merged, join_parts, joined_layers, merge_parts, merged_ref, reduce_share
from cluster.lora.parts import Part
from cluster.lora.peft_format import packed, unpack
from cluster.lora.weights import AdapterWeights, Factors
from cluster.messages import AdapterRef, Mixture
from tests.lora.adapters import mixed_logits, random_adapter
from tests.lora.mixtures import FINGERPRINT, LAYER, Case, adapter, cases, frobenius, optimum, served_delta
from tests.model.nano import logits, nano_model, random_ids

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ranks = st.integers(1, 12)


def _merged(case: Case, rank: int, dtype: torch.dtype) -> Merged:
    return merge_parts([reduce_share(*share) for share in case.shares], rank, dtype)


def _distance(case: Case, merged: Merged) -> float:
    return frobenius(case.exact - served_delta(merged.weights))


@settings(deadline=None, max_examples=200)
@given(cases(), ranks, DTYPES)
def test_the_bound_is_never_below_the_error_and_hardly_above(case: Case, rank: int, dtype: torch.dtype) -> None:
    merged = _merged(case, rank, dtype)
    error, bound, size = _distance(case, merged), merged.certificate.bound, frobenius(case.exact)
    assert error <= bound
    # What travels between shards is rounded to fp32, by 2**-24 of each share.
    shares = sum(frobenius(Case(*share, [0] * len(share[0])).exact) for share in case.shares)
    assert bound <= error * (1 + 1e-6) + 1e-6 * (size + shares) + 1e-119


@settings(deadline=None, max_examples=100)
@given(cases(), ranks)
def test_no_adapter_of_that_rank_is_nearer(case: Case, rank: int) -> None:
    merged = _merged(case, rank, torch.float32)
    shares = sum(frobenius(Case(*share, [0] * len(share[0])).exact) for share in case.shares)
    assert merged.weights.factors[LAYER].rank <= rank
    assert _distance(case, merged) <= optimum(case.exact, rank) * (1 + 1e-5) + 1e-6 * shares


@settings(deadline=None, max_examples=100)
@given(cases(), ranks)
def test_the_energy_kept_is_the_share_that_is_not_lost(case: Case, rank: int) -> None:
    merged = _merged(case, rank, torch.float32)
    size = frobenius(case.exact)
    kept = 1 - (_distance(case, merged) / size) ** 2 if size else 0.0
    assert 0 <= merged.certificate.kept_energy <= 1
    assert merged.certificate.kept_energy == pytest.approx(kept, abs=1e-5)


@settings(deadline=None, max_examples=100)
@given(cases(), ranks, st.integers(1, 6), DTYPES, st.data())
def test_any_tree_of_shards_that_drop_something_stays_within_what_they_report(
    case: Case, rank: int, most_columns: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    parts = [reduce_share(*share, most_columns=most_columns) for share in case.shares]
    while len(parts) > 1 and data.draw(st.booleans()):
        split = data.draw(st.integers(2, len(parts)))
        parts = [*parts[split:], join_parts(parts[:split], most_columns)]
    merged = merge_parts(parts, rank, dtype)
    assert _distance(case, merged) <= merged.certificate.bound
    lost = sum(part.layers[LAYER].lost for part in parts)
    # The distance to the matrices of a rank changes by no more than the matrix does: twice what the parts lost.
    slack = 1e-5 if dtype is torch.float32 else 2e-2
    shares = sum(frobenius(Case(*share, [0] * len(share[0])).exact) for share in case.shares)
    assert merged.certificate.bound <= optimum(case.exact, rank) + 2 * lost + slack * shares + 1e-119


@settings(deadline=None, max_examples=50)
@given(cases())
def test_what_a_shard_drops_is_its_share_s_tail(case: Case) -> None:
    for share in case.shares:
        exact = Case(*share, [0] * len(share[0])).exact
        part = reduce_share(*share, most_columns=2).layers[LAYER]
        assert part.lost == pytest.approx(optimum(exact, 2), rel=1e-5, abs=1e-6 * frobenius(exact) + 1e-119)


def test_a_share_travels_in_the_smaller_form() -> None:
    few = reduce_share([_random(4, 24, 24, seed) for seed in range(2)], [1.0, 0.5])
    many = reduce_share([_random(4, 24, 24, seed) for seed in range(5)], [1.0] * 5)
    assert few.layers[LAYER].factors is not None
    assert many.layers[LAYER].dense_MN is not None
    assert few.num_bytes == 4 * (24 + 24) * 8
    assert many.num_bytes == 4 * 24 * 24


def test_factors_of_bf16_and_weights_of_sixty_fourths_travel_without_any_loss() -> None:
    adapters = [_random(4, 48, 40, seed, torch.bfloat16) for seed in range(3)]
    part = reduce_share(adapters, [1.0, 13 / 64, 0.75]).layers[LAYER]
    assert part.lost < 1e-14 * frobenius(Case(adapters, [1.0, 13 / 64, 0.75], [0] * 3).exact)


def test_parts_are_read_only_and_survive_the_wire_without_a_copy() -> None:
    part = reduce_share([_random(4, 24, 30, seed) for seed in range(2)], [1.0, 0.5])
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(part, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 1000
    back: Part = pickle.loads(data, buffers=[buffer.raw().toreadonly() for buffer in buffers])
    for before, after in zip(part.layers[LAYER].factors or (), back.layers[LAYER].factors or (), strict=True):
        assert not after.flags.writeable
        assert not before.flags.writeable
        assert np.array_equal(before, after)
    torch.testing.assert_close(
        merge_parts([back], 4, torch.float32).weights.factors[LAYER].a_RI,
        merge_parts([part], 4, torch.float32).weights.factors[LAYER].a_RI,
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_certified_is_what_arrives_at_the_replica_bit_for_bit(dtype: torch.dtype) -> None:
    adapters = [random_adapter(nano_model(), ranks=(2, 3), seed=seed) for seed in range(4)]
    merged = merge_parts([reduce_share(adapters, [0.3, 1 / 64, 50.0, 1.0])], 5, dtype)
    back = unpack(packed(merged.weights), dtype)
    assert back.factors.keys() == merged.weights.factors.keys()
    assert len({f.scale for f in merged.weights.factors.values()}) > 1
    for name, f in merged.weights.factors.items():
        assert back.factors[name].scale == f.scale
        assert torch.equal(back.factors[name].a_RI, f.a_RI)
        assert torch.equal(back.factors[name].b_OR, f.b_OR)
        assert f.a_RI.dtype == dtype
    assert back.base_fingerprint == FINGERPRINT


def test_a_model_that_serves_the_merged_adapter_answers_as_with_the_mixture() -> None:
    model = nano_model()
    adapters = [random_adapter(model, ranks=(2, 3), seed=seed) for seed in range(6)]
    weights = [0.5, 1 / 64, 0.25, 1.0, 0.125, 0.3]
    refs = [AdapterRef(f"domain{index}", 1) for index in range(6)]
    ids_BT = random_ids(model, 2, 5)
    served = copy.deepcopy(model)
    batch = attach_mixed_batch(served)
    mixture = Mixture.of(dict(zip(refs, weights, strict=True)))
    batch.set_rows([mixture] * 2, [5] * 2, dict(zip(refs, adapters, strict=True)))
    parts = [reduce_share(adapters[:2], weights[:2]), reduce_share(adapters[2:], weights[2:])]
    merged = merge_parts(parts, 18, torch.float32)
    torch.testing.assert_close(
        mixed_logits(model, merged.weights, ids_BT), logits(served, ids_BT), rtol=1e-4, atol=1e-4
    )


def test_layers_that_only_some_adapters_change_are_merged_from_those() -> None:
    first, second = _random(2, 8, 9, 0), _random(2, 8, 9, 1)
    other = AdapterWeights({**second.factors, "other": Factors(torch.ones(1, 3), torch.ones(2, 1), 2.0)}, FINGERPRINT)
    merged = merge_parts([reduce_share([first], [1.0]), reduce_share([other], [0.5])], 4, torch.float32)
    np.testing.assert_allclose(served_delta(merged.weights, "other").astype(np.float64), np.ones((2, 3)))
    expected = Case([first, second], [1.0, 0.5], [0, 1]).exact
    np.testing.assert_allclose(
        served_delta(merged.weights).astype(np.float64), expected.astype(np.float64), rtol=1e-5, atol=1e-6
    )


def test_groups_of_layers_merged_by_themselves_are_the_whole() -> None:
    layers = {f"model.layers.{i}.x": Factors(torch.randn(2, 6), torch.randn(5, 2), 1.0) for i in range(3)}
    adapters = [AdapterWeights(layers, FINGERPRINT)] * 2
    whole = merge_parts([reduce_share(adapters, [1.0, 2.0])], 2, torch.float32)
    groups = [merge_parts([reduce_share(adapters, [1.0, 2.0], layers=[name])], 2, torch.float32) for name in layers]
    joined = joined_layers(groups)
    assert joined.certificates == whole.certificates
    assert joined.weights.factors.keys() == whole.weights.factors.keys()


def test_the_total_certificate_is_that_of_all_layers_as_one_matrix() -> None:
    total = in_total([Certificate("qr_svd", 4, 3.0, 6.0), Certificate("dense_sum", 2, 4.0, 8.0)])
    assert total.method == "dense_sum+qr_svd"
    assert total.rank == 4
    assert total.bound == pytest.approx(5.0)
    assert total.kept_energy == pytest.approx(100 / 125)


def test_a_sum_beyond_what_a_model_can_add_is_refused() -> None:
    huge = adapter(torch.full((1, 3), 1e30), torch.full((2, 1), 1e30))
    with pytest.raises(InvalidMixture, match="lower the weights"):
        reduce_share([huge], [1.0])
    with pytest.raises(InvalidMixture, match="lower the weights"):
        reduce_share([adapter(torch.ones(1, 3), torch.ones(2, 1))], [1e308])


def test_what_has_no_weight_does_no_harm_however_large_it_is() -> None:
    huge = adapter(torch.full((1, 9), 1e30), torch.zeros(8, 1))
    merged = merge_parts([reduce_share([huge, _random(2, 8, 9, 0)], [1.0, 1.0])], 4, torch.float16)
    merged.weights.check_finite()
    assert merged.certificate.kept_energy > 0.999


def test_adapters_of_two_bases_are_refused() -> None:
    other = AdapterWeights(_random(2, 3, 4, 0).factors, "fedcba9876543210")
    with pytest.raises(IncompatibleAdapter, match="expected one base"):
        reduce_share([_random(2, 3, 4, 0), other], [1.0, 1.0])
    with pytest.raises(IncompatibleAdapter, match="expected one base"):
        merge_parts([reduce_share([_random(2, 3, 4, 0)], [1.0]), reduce_share([other], [1.0])], 2, torch.float32)


def test_a_merged_mixture_s_name_is_its_own_and_nobody_can_ask_for_it() -> None:
    law, sql = AdapterRef("law", 1), AdapterRef("sql", 2)
    name = merged_ref(Mixture.of({law: 0.5, sql: 0.25}), 16, torch.bfloat16)
    assert name == merged_ref(Mixture.of({sql: 0.25, law: 0.5}), 16, torch.bfloat16)
    others = [
        merged_ref(Mixture.of({law: 0.5, sql: 0.5}), 16, torch.bfloat16),
        merged_ref(Mixture.of({law: 0.5, sql: 0.25}), 8, torch.bfloat16),
        merged_ref(Mixture.of({law: 0.5, sql: 0.25}), 16, torch.float32),
    ]
    assert len({name, *others}) == 4
    with pytest.raises(InvalidInput):
        AdapterRef.parse(str(name))


def _random(rank: int, num_out: int, num_in: int, seed: int, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    a_RI = torch.randn(rank, num_in, generator=generator).to(dtype)
    return adapter(a_RI, torch.randn(num_out, rank, generator=generator).to(dtype), 2.0)
