"""Sums held either way, and distances from them, against extended precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.lora import weighted_sum as module
from cluster.lora.merge_plan import crossover
from cluster.lora.truncation import balanced, power_of_two, truncated
from cluster.lora.weighted_sum import WeightedSum, gamma, mass, norm, weighted_sum
from tests.lora.mixtures import LAYER, Case, adapter, cases, exact_sum, frobenius, optimum


def _sum(case: Case) -> WeightedSum:
    return weighted_sum((a.factors[LAYER], w) for a, w in zip(case.adapters, case.weights, strict=True))


def _extended(x: torch.Tensor) -> np.ndarray:
    return x.numpy().astype(np.longdouble)


def _held(total: WeightedSum) -> np.ndarray:
    if total.dense_MN is not None:
        return _extended(total.dense_MN)
    assert total.factors is not None
    return _extended(total.factors[0]) @ _extended(total.factors[1]).T


@settings(deadline=None, max_examples=100)
@given(cases())
def test_a_sum_is_held_in_the_smaller_form_within_the_error_it_states(case: Case) -> None:
    total = _sum(case)
    num_columns = sum(a.factors[LAYER].rank for a in case.adapters)
    assert (total.columns is None) == (num_columns >= crossover(*total.shape))
    assert frobenius(_held(total) - case.exact) <= total.error <= 1e-12 * total.mass + 1e-119
    assert frobenius(case.exact) <= total.mass
    matrix = total.as_matrix()
    assert frobenius(_held(matrix) - case.exact) <= matrix.error <= 1e-12 * total.mass + 1e-119


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(1, 5), st.sampled_from([1e-9, 1.0]), st.booleans())
def test_distances_are_bounded_from_above_and_closely(case: Case, rank: int, away: float, is_turned: bool) -> None:
    total = _sum(case)
    left, right = truncated(total, rank)
    left = left * (1 + away)
    exact, measured = case.exact, total
    if is_turned:
        exact, left, right, measured = exact.T, right, left, total.transposed
    distance = frobenius(exact - _extended(left) @ _extended(right).T)
    bound = measured.distance(left, right)
    assert distance <= bound <= distance * (1 + 1e-9) + 1e-9 * (total.mass + mass(left, right)) + 1e-119


def test_both_ways_of_measuring_a_distance_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x_MK, y_NK = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (300, 200))
    left, right = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (300, 200))
    total = WeightedSum((x_MK, y_NK), None, 5, mass(x_MK, y_NK), 0.0)
    by_cores = total.distance(left, right)
    monkeypatch.setattr(module, "_QR_SLOWNESS", 1000)
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", 7 * 200)
    by_blocks = total.distance(left, right)
    assert by_cores != by_blocks
    assert by_cores == pytest.approx(by_blocks, rel=1e-7)
    assert by_blocks == pytest.approx(float(torch.linalg.norm(x_MK @ y_NK.T - left @ right.T)), rel=1e-9)


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(1, 12))
def test_truncation_is_the_nearest_of_its_rank(case: Case, rank: int) -> None:
    total = _sum(case)
    left, right = truncated(total, rank)
    assert left.shape[1] == right.shape[1] <= max(rank, 1)
    distance = frobenius(_held(total) - _extended(left) @ _extended(right).T)
    assert distance <= optimum(_held(total), rank) * (1 + 1e-6) + 1e-7 * frobenius(_held(total))


@settings(deadline=None, max_examples=100)
@given(cases(), st.floats(-20, 20))
def test_balancing_rounds_nothing(case: Case, exponent: float) -> None:
    left, right = truncated(_sum(case), 4)
    left = left * 10**exponent
    b, a, scale = balanced(left, right)
    assert torch.equal(b * scale * a[0], left * right[0])
    assert (b.abs() <= 2).all()
    assert (a.abs() <= 2).all()
    assert float(np.float32(scale)) == scale
    assert np.log2(scale) == np.round(np.log2(scale))


def test_norms_and_masses_are_rounded_up() -> None:
    x = torch.full((1000, 7), 0.1, dtype=torch.float64)
    exact = frobenius(_extended(x))
    assert exact <= norm(x) <= exact * (1 + 1e-11)
    assert 7 * np.sqrt(10.0) * np.sqrt(10.0) <= mass(x, x) <= 70 * (1 + 1e-11)
    assert gamma(3) >= 3 * 2.0**-53


def test_a_sum_of_many_is_the_sum_whatever_the_order() -> None:
    generator = torch.Generator().manual_seed(1)
    adapters = [
        adapter(torch.randn(8, 40, generator=generator), torch.randn(30, 8, generator=generator)) for _ in range(200)
    ]
    weights = torch.rand(200, generator=generator).tolist()
    forward = Case(adapters, weights, [0] * 200)
    backward = Case(adapters[::-1], weights[::-1], [0] * 200)
    exact = exact_sum(adapters, weights)
    for total in (_sum(forward), _sum(backward)):
        assert frobenius(_held(total) - exact) <= total.error
    assert not torch.equal(_sum(forward).dense_MN, _sum(backward).dense_MN)


@pytest.mark.parametrize("x", [1e-30, 0.3, 1.0, 255.0, 256.0, 1e30])
@pytest.mark.parametrize("step", [1, 8])
def test_a_power_of_two_is_the_next_above(x: float, step: int) -> None:
    exponent = np.log2(power_of_two(x, step))
    assert exponent % step == 0
    assert x < 2**exponent <= x * 2**step
