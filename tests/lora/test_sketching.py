"""Merging by sketch against the exact sum: never further than certified, nearly as near as any adapter of the rank."""

import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.lora.merging import Merged, merge_parts, reduce_share, share_sums
from cluster.lora.sketching import Multiply, Project, Sketch, Sums, merge_by_sketch
from cluster.lora.weights import AdapterWeights
from tests.lora.mixtures import FINGERPRINT, LAYER, Case, adapter, cases, exact_sum, frobenius, optimum, served_delta


def _asked(shards: Sequence[Sums], rank: int, dtype: torch.dtype, seed: int = 0) -> tuple[Merged, list[object]]:
    """What the rounds give, and everything that travelled, each thing pickled and read back."""
    rounds, travelled = merge_by_sketch(FINGERPRINT, rank, dtype, seed), []
    ask = next(rounds)
    while True:
        sent = pickle.loads(pickle.dumps(ask))
        answers = [pickle.loads(pickle.dumps(sent.answer(sums))) for sums in shards]
        travelled += [sent, *answers]
        try:
            ask = rounds.send(answers)
        except StopIteration as end:
            return end.value, travelled


def _by_sketch(case: Case, rank: int, dtype: torch.dtype) -> Merged:
    return _asked([dict(share_sums(*share)) for share in case.shares], rank, dtype)[0]


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(1, 12), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_bound_is_never_below_the_error(case: Case, rank: int, dtype: torch.dtype) -> None:
    merged = _by_sketch(case, rank, dtype)
    error, bound = frobenius(case.exact - served_delta(merged.weights)), merged.certificate.bound
    assert error <= bound
    assert merged.weights.factors[LAYER].rank <= rank
    if len(case.shares) == 1:
        cast = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
        assert bound <= error + cast * frobenius(case.exact) + 1e-119


def _spread(num_out: int, num_in: int, num_adapters: int, decay: float) -> list[AdapterWeights]:
    """Adapters that share directions, the later the less."""
    generator = torch.Generator().manual_seed(5)
    out_sizes, in_sizes = ((torch.arange(width) + 1.0) ** -decay for width in (num_out, num_in))
    return [
        adapter(
            torch.randn(8, num_in, generator=generator) * in_sizes,
            torch.randn(num_out, 8, generator=generator) * out_sizes[:, None],
        )
        for _ in range(num_adapters)
    ]


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(160, 96), (96, 160)])
@pytest.mark.parametrize("num_adapters", [4, 60])
def test_a_sketch_is_within_a_hundredth_of_the_optimum(decay: float, shape: tuple[int, int], num_adapters: int) -> None:
    adapters = _spread(*shape, num_adapters, decay)
    weights = [1.0] * num_adapters
    exact = exact_sum(adapters, weights)
    shards = [dict(share_sums(adapters[start::3], weights[start::3])) for start in range(3)]
    merged, _ = _asked(shards, 8, torch.float32)
    best = optimum(exact, 8)
    assert frobenius(exact - served_delta(merged.weights)) <= 1.01 * best
    assert merged.certificate.bound <= 1.02 * math.sqrt(3) * best


def test_shards_that_err_alike_are_certified_for_all_of_them() -> None:
    adapters = _spread(90, 110, 30, 0.0)
    case = Case(adapters * 3, [1.0] * 90, [0] * 30 + [1] * 30 + [2] * 30)
    merged = _by_sketch(case, 2, torch.float32)
    error = frobenius(case.exact - served_delta(merged.weights))
    assert error <= merged.certificate.bound <= error * (1 + 1e-5)


def test_shards_that_cancel_one_another_are_certified_all_the_same() -> None:
    adapters = _spread(20, 30, 4, 0.0)
    opposite = [adapter(-a.factors[LAYER].a_RI, a.factors[LAYER].b_OR) for a in adapters]
    merged = _by_sketch(Case([*adapters, *opposite], [1.0] * 8, [0] * 4 + [1] * 4), 3, torch.float32)
    assert frobenius(served_delta(merged.weights)) <= 1e-5
    assert merged.certificate.bound >= frobenius(served_delta(merged.weights))


def test_only_products_with_few_columns_travel() -> None:
    adapters = _spread(90, 120, 40, 0.5)
    shards = [dict(share_sums(adapters[start::2], [1.0] * 20)) for start in range(2)]
    _, travelled = _asked(shards, 4, torch.float32)
    assert [type(item) for item in travelled[::3]] == [Sketch, Multiply, Multiply, Multiply, Multiply, Project]
    for answer in (answer for start in range(0, 15, 3) for answer in travelled[start + 1 : start + 3]):
        assert answer[LAYER].array.shape in {(90, 12), (120, 12)}
        assert answer[LAYER].array.dtype == np.float32
    for projection in travelled[16:]:
        assert projection[LAYER].z_NL.array.shape == (120, 36)


def test_the_seed_decides_and_a_rank_that_leaves_nothing_out_is_exact() -> None:
    adapters = _spread(20, 30, 2, 0.0)
    case = Case(adapters, [1.0, 0.5], [0, 1])
    shards = [dict(share_sums(*share)) for share in case.shares]
    first, again, other = (_asked(shards, 3, torch.float32, seed)[0].weights.factors[LAYER] for seed in (1, 1, 2))
    assert torch.equal(first.a_RI, again.a_RI)
    assert not torch.equal(first.a_RI, other.a_RI)
    whole = _by_sketch(case, 16, torch.float32)
    exactly = merge_parts([reduce_share(*share) for share in case.shares], 16, torch.float32)
    np.testing.assert_allclose(
        served_delta(whole.weights).astype(np.float64), served_delta(exactly.weights).astype(np.float64), atol=1e-5
    )
