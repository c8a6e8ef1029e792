"""The starter gives right answers through the right adapters, and only through those."""

from statistics import mean
from typing import Any

import pytest

from cluster.lora.catalog import Catalog
from cluster.router.tiny_ada import TinyAda
from tests.e2e.conftest import Starter, zephyra

pytestmark = pytest.mark.starter

# Written for this test: no word of it was made by the grammar that the router learned from.
STRANGERS = """
What's the weather like tomorrow?
Write me a haiku about autumn leaves.
Who won the World Cup in 2014?
How do I unclog a kitchen sink?
Can dogs eat chocolate?
hola
Is it normal to dream in colour?
Explain recursion to a five-year-old.
public static void main(String[] args) { }
I feel sad today.
Suggest a name for my bakery.
What is the meaning of life?
Schedule a meeting with Laura on Friday at noon.
Why is the sky blue?
Recommend three podcasts on economics.
What happened in the season finale?
How many calories does a banana have?
Fix this bug: IndexError: list index out of range
Compare renting and buying a flat.
Plan a two-week trip through Patagonia.
Who is your favourite singer?
Is my landlord allowed to raise the rent twice a year?
What are the side effects of ibuprofen?
Tell me something funny.
Draft a resignation letter.
How does a heat pump work?
asdf qwer zxcv
What should I wear to a funeral?
My printer keeps jamming.
Give me a workout for the back.
When is the next solar eclipse?
How old is the universe?
Should I invest in bonds?
Translate this contract clause into plain language, it is about liability.
Proofread my cover letter, please.
Does this mole look suspicious?
What rhymes with orange?
Teach me the rules of cricket.
How long do I boil an egg?
Who discovered penicillin?
""".strip().splitlines()


def test_routed_answers_are_right(report: dict[str, Any]) -> None:
    routed = {name: domain["exact_match"]["routed"] for name, domain in report["domains"].items()}
    assert len(routed) >= 8
    assert mean(routed.values()) >= 0.9, routed
    assert min(routed.values()) >= 0.8, routed


@pytest.mark.parametrize("through", ["base", "wrong"])
def test_answers_come_from_the_right_adapter_alone(report: dict[str, Any], through: str) -> None:
    shares = {name: domain["exact_match"][through] for name, domain in report["domains"].items()}
    assert max(shares.values()) <= 0.3, shares


def test_routing_costs_nothing_beside_the_right_adapter_nor_beside_the_base(report: dict[str, Any]) -> None:
    losses = [domain["loss"] for domain in report["domains"].values()]
    assert mean(loss["routed"] - loss["oracle"] for loss in losses) < 0.01
    # Each domain's prompts once more, by a router that does not know the domain.
    assert mean(loss["strange"] - loss["base"] for loss in losses) < 0.02
    assert mean(domain["strange_abstained"] for domain in report["domains"].values()) > 0.95


def test_each_adapter_beats_the_base_on_its_domain(report: dict[str, Any]) -> None:
    for name, domain in report["domains"].items():
        assert domain["loss"]["oracle"] < domain["loss"]["base"], name
        assert domain["loss"]["worst"] >= domain["loss"]["oracle"], name


def test_prompts_find_their_domain_and_strangers_the_base(report: dict[str, Any]) -> None:
    domains = report["domains"].values()
    assert mean(domain["routed_right"] for domain in domains) >= 0.98
    assert mean(domain["abstained"] for domain in domains) <= 0.02
    assert report["routing"]["none_rows"] == 200
    assert report["routing"]["none_to_base"] >= 0.95


def test_strangers_of_another_hand_go_to_the_base(starter: Starter) -> None:
    router = TinyAda.load(starter.root / "router" / str(Catalog(starter.root).load().router))
    taken = [text for text, decision in zip(STRANGERS, router.route(STRANGERS), strict=True) if decision.weights]
    assert len(taken) <= len(STRANGERS) // 10, taken


def test_training_prints_what_it_measured_and_is_not_done_twice(starter: Starter) -> None:
    for said in ("published base 1", "published 8 adapters", "published router 1", "joint stage, change"):
        assert said in starter.output.read_text()
    before = Catalog(starter.root).latest()
    again = zephyra("train", "all", "--root", str(starter.root), "--data", str(starter.data))
    assert "done already" in again.stdout
    assert Catalog(starter.root).latest() == before
