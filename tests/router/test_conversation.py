"""Sticky routing: what is promised of it whatever the logits, by hand, and with a trained router."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidInput
from cluster.messages import RoutingDecision
from cluster.router.conversation import DECAY, ENOUGH_CHARACTERS, MAX_CARRY, Turn, settle
from cluster.router.policy import Policy
from cluster.router.tiny_ada import TinyAda
from tests.router.prompts import DOMAINS, STRANGE, prompts

NAMES = ("a", "b", "c")
LOGIT = st.floats(-30, 30, allow_nan=False)
TURN = st.builds(Turn, st.lists(LOGIT, min_size=4, max_size=4).map(np.array), st.integers(0, 200))
THRESHOLD = st.floats(-5, 0)
LONG = ENOUGH_CHARACTERS

FOLLOW_UPS = ("yes", "why?", "again please", "thanks", "and then?", "go on")
"""Turns that a chat gives their domain."""


def _of(a: float, b: float, num_characters: int = LONG) -> Turn:
    return Turn(np.array([a, b, -20.0, 0.0]), num_characters)


def _contents(decision: RoutingDecision) -> tuple[object, object]:
    return decision.probabilities, decision.weights


@given(TURN, THRESHOLD)
@settings(deadline=None, max_examples=100)
def test_one_turn_is_itself(turn: Turn, threshold: float) -> None:
    assert settle([turn], Policy(threshold)).tolist() == turn.logits.tolist()


@given(st.lists(TURN, min_size=1, max_size=8), THRESHOLD)
@settings(deadline=None, max_examples=200)
def test_earlier_turns_only_help_and_only_so_far(turns: list[Turn], threshold: float) -> None:
    policy = Policy(threshold)
    own, settled = turns[-1].logits, settle(turns, policy)
    assert settled[-1] == own[-1]
    for logit, helped in zip(own[:-1], settled[:-1], strict=True):
        against = min(0.0, logit - own[-1])
        assert logit - 1e-9 <= helped <= logit - against + MAX_CARRY + 1e-9
    gone_to = {name for i in range(len(turns) - 1) for name in policy.weights(NAMES, settle(turns[: i + 1], policy))}
    helped_names = {name for name, a, b in zip(NAMES, own, settled, strict=False) if a != b}
    assert helped_names <= gone_to


@given(st.lists(TURN, max_size=7), st.sampled_from(range(3)), st.floats(0.01, 10), THRESHOLD)
@settings(deadline=None, max_examples=200)
def test_a_clear_change_switches_at_once(before: list[Turn], new: int, beyond: float, threshold: float) -> None:
    """Clear: so far above none that not even all that may be carried brings another domain an eighth of the weight."""
    logits = [0.0, 0.0, 0.0, 0.0]
    logits[new] = MAX_CARRY + math.log(7) + beyond
    settled = settle([*before, Turn(np.array(logits), 10)], Policy(threshold))
    assert Policy(threshold).weights(NAMES, settled) == {NAMES[new]: 1.0}


@given(st.lists(TURN, max_size=7), st.floats(0.01, 10), THRESHOLD)
@settings(deadline=None, max_examples=200)
def test_a_long_prompt_far_from_every_domain_is_nobodys(before: list[Turn], beyond: float, threshold: float) -> None:
    far = threshold - MAX_CARRY - beyond
    settled = settle([*before, Turn(np.array([far, far, far, 0.0]), LONG)], Policy(threshold))
    assert Policy(threshold).weights(NAMES, settled) == {}


@given(st.lists(TURN, min_size=1, max_size=8), st.floats(0.01, 20), THRESHOLD)
@settings(deadline=None, max_examples=200)
def test_a_domain_that_is_never_selected_has_no_say(turns: list[Turn], below: float, threshold: float) -> None:
    without = settle(turns, Policy(threshold))
    grown = [Turn(np.insert(t.logits, -1, t.logits[-1] + threshold - below), t.num_characters) for t in turns]
    found = settle(grown, Policy(threshold))
    assert np.delete(found, 3).tolist() == without.tolist()


def _settled_slowly(turns: list[Turn], policy: Policy) -> list[float]:
    """Domain by domain, by name."""
    carried: dict[str, float] = {}
    for turn in turns:
        own = dict(zip((*NAMES, "none"), turn.logits.tolist(), strict=True))
        say = min(1.0, turn.num_characters / ENOUGH_CHARACTERS) ** 2
        settled = dict(own)
        for name in carried:
            margin = own[name] - own["none"]
            settled[name] = own["none"] + carried[name] + (margin if margin > 0 else say * margin)
        chosen = policy.weights(NAMES, np.array(list(settled.values())))
        if chosen:
            beyond = {name: own[name] - own["none"] - policy.threshold for name in NAMES}
            carried = {name: max(min(MAX_CARRY, beyond[name]), carried.get(name, 0.0)) for name in chosen}
        else:
            carried = {name: DECAY * carry for name, carry in carried.items()}
    return list(settled.values())


@given(st.lists(TURN, min_size=1, max_size=8), THRESHOLD)
@settings(deadline=None, max_examples=200)
def test_logits_are_those_of_a_loop_over_all_domains(turns: list[Turn], threshold: float) -> None:
    assert settle(turns, Policy(threshold)).tolist() == _settled_slowly(turns, Policy(threshold))


def test_by_hand() -> None:
    policy = Policy(0.0)
    # All that may be carried, and of a turn of half the length a quarter of what it says against the domain.
    assert settle([_of(9, -9), _of(-3, -9)], policy).tolist() == [MAX_CARRY - 3, -9, -20, 0]
    assert settle([_of(9, -9), _of(-3, -9, LONG // 2)], policy).tolist() == [MAX_CARRY - 0.75, -9, -20, 0]
    # Less than all of it; what speaks for the domain counts whole.
    assert settle([_of(1.5, -9), _of(2, -9, 0)], policy).tolist() == [3.5, -9, -20, 0]
    # A follow-up takes nothing from it; each turn that went to none takes a share.
    assert settle([_of(9, -9), _of(-3, -9), _of(-3, -9), _of(-1, -9)], policy)[0] == MAX_CARRY - 1
    assert settle([_of(9, -9), _of(-30, -30), _of(-1, -9)], policy)[0] == DECAY * MAX_CARRY - 1
    # A change of domain forgets the one before.
    assert settle([_of(9, -9), _of(-9, 9), _of(-1, -1)], policy).tolist() == [-1, MAX_CARRY - 1, -20, 0]


def test_a_single_turn_is_routed_as_a_prompt(ada: TinyAda) -> None:
    for text in (*prompts("val", 5)[0], *STRANGE, *FOLLOW_UPS):
        (decision,) = ada.route([text])
        assert _contents(ada.route_conversation([text])) == _contents(decision)
    with pytest.raises(InvalidInput, match="no turn"):
        ada.route_conversation([])


def test_a_follow_up_stays_with_the_chat(ada: TinyAda) -> None:
    assert all(not decision.weights for decision in ada.route(FOLLOW_UPS)), "alone they belong to no domain"
    for text, domain in zip(*prompts("val", 3, seed=7), strict=True):
        for follow_up in FOLLOW_UPS:
            assert ada.route_conversation([text, follow_up]).weights == {domain: 1.0}, (text, follow_up)
        assert ada.route_conversation([text, *FOLLOW_UPS[:3]]).weights == {domain: 1.0}


def test_another_domains_prompt_switches_and_a_strangers_leaves(ada: TinyAda) -> None:
    texts, domains = prompts("val", 3, seed=8)
    for text, domain in zip(texts, domains, strict=True):
        before = [first for first, other in zip(texts, domains, strict=True) if other != domain]
        alone = ada.route([text])[0].weights
        assert set(alone) == {domain}
        for earlier in before:
            assert set(ada.route_conversation([earlier, text]).weights) == {domain}
    clear = [text for text in STRANGE if len(text) >= 20]
    assert len(clear) >= 5
    for domain in DOMAINS:
        first = texts[domains.index(domain)]
        assert all(not ada.route_conversation([first, stranger]).weights for stranger in clear)
