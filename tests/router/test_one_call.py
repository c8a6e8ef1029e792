"""Logits by the native call: against the modules in torch, and that nothing beside a text moves them."""

import copy
import platform

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.kernels import library
from cluster.router.encoder import Encoder
from cluster.router.naive_bayes import NaiveBayes
from cluster.router.one_call import OneCall
from cluster.router.tiny_ada import TinyAda
from cluster.router.word_vectors import WORD_WIDTH, WordVectors
from tests.router.prompts import DOMAINS, STRANGE, prompts

TEXTS = ["", "a", "7", "rain " * 300, "é" * 2000, *STRANGE, *prompts("val", 5)[0]]


@pytest.fixture(scope="module", params=["n-grams", "and words", "and votes"])
def router(ada: TinyAda, request: pytest.FixtureRequest) -> TinyAda:
    """With a domain that was added, so that offsets count; all parts are away from where they begin."""
    if library.native_library() is None:
        pytest.skip("no C++ compiler")
    made = copy.deepcopy(ada.with_domain("games", ["Who moves first in chess?", "Deal seven cards to each player"]))
    rng = torch.Generator().manual_seed(1)
    if request.param == "and words":
        assert isinstance(made.encoder, Encoder)
        slots_Y = torch.cat([torch.from_numpy(one.slots_N[:1]) for one in made.encoder.read(prompts("val", 20)[0])])
        vectors_YQ = torch.randn(len(slots_Y.unique()), WORD_WIDTH, generator=rng)
        made.encoder.words = WordVectors(slots_Y.unique().int(), vectors_YQ / 8, made.encoder.width)
    if request.param == "and votes":
        assert isinstance(made.encoder, Encoder)
        texts, domains = prompts("train", 60)
        numbers = np.array([DOMAINS.index(domain) for domain in domains])
        made.encoder.votes = NaiveBayes.counted(made.encoder.read(texts), numbers, len(DOMAINS), made.encoder.width)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=rng)
        made.head.none_offset += 0.5
        made.head.temperature.fill_(0.7)
    return made


def _found(router: TinyAda, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return router.logits(texts)


def _expected(router: TinyAda, texts: list[str]) -> torch.Tensor:
    """Through torch: where a gradient may be wanted, every module runs by itself."""
    with torch.enable_grad():
        return router.logits(texts).detach()


@pytest.mark.parametrize("architecture", ["native", "x86-64-v3"])
def test_they_are_those_of_the_modules(router: TinyAda, architecture: str) -> None:
    if architecture != "native" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{architecture} does not run on {platform.machine()}")
    kernels = library.native_library(architecture)
    assert kernels is not None
    assert isinstance(router.encoder, Encoder)
    found_BC = torch.from_numpy(OneCall(kernels, router.encoder, router.head).logits(TEXTS))
    expected_BC = _expected(router, TEXTS)
    # A key's number that lies between two whole ones may be rounded the other way: 12 / 0.7 / 2^15 each.
    assert torch.allclose(found_BC[:, :-1], expected_BC[:, :-1], rtol=0, atol=2e-3)
    assert (found_BC - expected_BC)[:, :-1].abs().median() < 1e-5
    assert torch.allclose(found_BC[:, -1], expected_BC[:, -1], rtol=0, atol=2e-5)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bit_depends_on_the_texts_beside(router: TinyAda, texts: list[str]) -> None:
    alone_BC = torch.cat([_found(router, [text]) for text in texts])
    assert torch.equal(_found(router, texts), alone_BC)


def test_many_texts_that_let_go_of_the_lock_are_scored_alike(router: TinyAda) -> None:
    many = [text for number in range(200) for text in (f"rain {number}", *TEXTS)]
    alone_BC = torch.cat([_found(router, [text]) for text in many])
    assert torch.equal(_found(router, many), alone_BC)


def test_what_is_written_to_a_router_counts_at_once(router: TinyAda) -> None:
    changed = copy.deepcopy(router)
    _found(changed, TEXTS)
    with torch.no_grad():
        for tensor in (*changed.parameters(), changed.head.offsets_D, changed.head.temperature):
            tensor += 0.01
        changed.head.set_rows(0, changed.head.prototypes_DPV[1])
    assert torch.allclose(_found(changed, TEXTS), _expected(changed, TEXTS), rtol=0, atol=2e-3)
    assert not torch.allclose(_found(changed, TEXTS), _found(router, TEXTS), rtol=0, atol=2e-3)


def test_a_sealed_router_decides_alike_and_what_is_made_of_it_is_another(router: TinyAda) -> None:
    expected = [decision.probabilities for decision in router.route(TEXTS)]
    sealed = copy.deepcopy(router)
    sealed.seal()
    assert [decision.probabilities for decision in sealed.route(TEXTS)] == expected
    less = sealed.without_domain("games")
    assert "games" not in less.route(["Who moves first in chess?"])[0].probabilities
    assert [decision.probabilities for decision in sealed.route(TEXTS)] == expected


def test_a_router_of_no_domain_says_none(router: TinyAda) -> None:
    empty = router
    for domain in router.domains:
        empty = empty.without_domain(domain)
    assert torch.allclose(_found(empty, TEXTS), _found(router, TEXTS)[:, -1:], rtol=0, atol=0)


def test_serving_takes_it_and_training_does_not(router: TinyAda) -> None:
    assert isinstance(router.encoder, Encoder)
    at_once = OneCall.of(router.encoder, router.head)
    assert at_once is not None
    assert torch.equal(_found(router, TEXTS), torch.from_numpy(at_once.logits(TEXTS)))
    assert not torch.equal(_found(router, TEXTS), _expected(router, TEXTS))
    assert router.logits(TEXTS).requires_grad


def test_a_router_that_moved_is_read_where_it_is_now(router: TinyAda) -> None:
    moved = copy.deepcopy(router)
    before_BC = _found(moved, TEXTS)
    moved._apply(lambda tensor: tensor + 0.01 if tensor.is_floating_point() else tensor.clone())
    assert not torch.allclose(_found(moved, TEXTS), before_BC, rtol=0, atol=2e-3)
    assert torch.allclose(_found(moved, TEXTS), _expected(moved, TEXTS), rtol=0, atol=2e-3)
