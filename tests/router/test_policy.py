"""Logits to weights: what is promised of every mixture, whatever the logits."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import MAX_PROBABILITIES, NONE_DOMAIN, WEIGHT_STEP
from cluster.router.policy import MAX_SELECTED, MIN_SHARE, Policy, probabilities, round_weights

LOGIT = st.floats(-40, 40, allow_nan=False)
LOGITS = st.dictionaries(st.sampled_from("abcdefghij"), LOGIT, max_size=10)


@given(LOGITS, LOGIT, st.floats(-5, 5))
@settings(deadline=None, max_examples=200)
def test_weights_are_few_sum_to_one_and_lie_on_the_grid(
    logits: dict[str, float], none: float, threshold: float
) -> None:
    weights = Policy(threshold).weights(tuple(logits), np.array([*logits.values(), none]))
    assert len(weights) <= MAX_SELECTED
    passing = {name for name, logit in logits.items() if logit - none >= threshold}
    assert set(weights) <= passing
    assert bool(weights) == bool(passing)
    if weights:
        assert sum(weights.values()) == 1.0
        assert all(weight > 0 and (weight / WEIGHT_STEP).is_integer() for weight in weights.values())
        best = max(passing, key=lambda name: logits[name])
        # Of two that are all but equal the other one may get the odd step.
        assert max(weights.values()) - weights.get(best, max(weights.values())) <= WEIGHT_STEP


@given(LOGITS, LOGIT, st.floats(-5, 5), st.floats(0.01, 10))
@settings(deadline=None, max_examples=100)
def test_a_domain_below_the_threshold_changes_no_mixture(
    logits: dict[str, float], none: float, threshold: float, distance: float
) -> None:
    policy = Policy(threshold)
    before = policy.weights(tuple(logits), np.array([*logits.values(), none]))
    grown = {**logits, "new": none + threshold - distance}
    assert policy.weights(tuple(grown), np.array([*grown.values(), none])) == before


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(1e-6, 1e3), min_size=1))
@settings(deadline=None, max_examples=200)
def test_rounding_moves_no_weight_by_a_whole_step(weights: dict[str, float]) -> None:
    rounded = round_weights(weights)
    total = sum(weights.values())
    assert sum(rounded.values()) == 1.0
    assert all(abs(rounded.get(name, 0.0) - weight / total) < WEIGHT_STEP for name, weight in weights.items())


def test_by_hand() -> None:
    policy = Policy(threshold=1.0)
    assert policy.weights(("a", "b"), np.array([3.0, 0.5, 0.0])) == {"a": 1.0}
    assert policy.weights(("a", "b"), np.array([3.0, 3.0, 0.0])) == {"a": 0.5, "b": 0.5}
    assert policy.weights(("a", "b"), np.array([0.9, 0.5, 0.0])) == {}
    # exp(-1) / (1 + exp(-1)) = 0.2689 = 17.2 / 64
    assert policy.weights(("a", "b"), np.array([3.0, 2.0, 0.0])) == {"a": 47 / 64, "b": 17 / 64}


@given(LOGITS, LOGIT)
@settings(deadline=None, max_examples=100)
def test_probabilities_are_the_softmax(logits: dict[str, float], none: float) -> None:
    found = probabilities(tuple(logits), np.array([*logits.values(), none]))
    powers = {name: math.exp(logit) for name, logit in {**logits, NONE_DOMAIN: none}.items()}
    assert math.isclose(sum(found.values()), 1.0)
    for name, power in powers.items():
        assert math.isclose(found[name], power / sum(powers.values()), rel_tol=1e-9)


COARSE = st.integers(-6, 6).map(float)
"""Few different values, so that many are equal."""
MANY = st.lists(COARSE | LOGIT, max_size=120)


def _names(logits: list[float]) -> tuple[str, ...]:
    return tuple(f"d{number:03}" for number in range(len(logits)))


@given(MANY, LOGIT | COARSE, st.integers(-5, 5).map(float))
@settings(deadline=None, max_examples=200)
def test_weights_are_those_of_a_loop_over_all_domains(logits: list[float], none: float, threshold: float) -> None:
    margins = {domain: logit - none for domain, logit in zip(_names(logits), logits, strict=True)}
    passing = [domain for domain in margins if margins[domain] >= threshold]
    best = sorted(passing, key=lambda domain: (-margins[domain], domain))[:MAX_SELECTED]
    powers = {domain: math.exp(margins[domain] - margins[best[0]]) for domain in best}
    shares = {domain: power / sum(powers.values()) for domain, power in powers.items()}
    expected = round_weights({domain: share for domain, share in shares.items() if share >= MIN_SHARE}) if best else {}
    found = Policy(threshold).weights(_names(logits), np.array([*logits, none]))
    assert list(found.items()) == list(expected.items())


@given(MANY, LOGIT | COARSE)
@settings(deadline=None, max_examples=100)
def test_the_likeliest_domains_are_named_and_none(logits: list[float], none: float) -> None:
    likeliest = sorted(range(len(logits)), key=lambda number: (-logits[number], number))[:MAX_PROBABILITIES]
    found = probabilities(_names(logits), np.array([*logits, none]))
    assert list(found) == [*(_names(logits)[number] for number in sorted(likeliest)), NONE_DOMAIN]
    total = sum(math.exp(logit) for logit in (*logits, none))
    expected = [math.exp(logit) / total for logit in (*(logits[number] for number in sorted(likeliest)), none)]
    assert np.allclose(list(found.values()), expected, rtol=1e-9, atol=0)
