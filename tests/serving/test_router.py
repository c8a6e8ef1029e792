"""The router's deployment: it decides as tiny ada does, and always with the router that is published."""

import asyncio
import logging
import shutil

import pytest

from cluster.lora.catalog import Catalog, Change
from cluster.messages import RoutingDecision
from deployments.router import Router
from tests.nano import publish_router
from tests.router.small_bert import write_small_bert

pytestmark = pytest.mark.anyio

PROMPTS = ["is this contract valid", "solve the equation", "tell me a joke", ""]


def contents(decisions):
    return [(decision.probabilities, decision.weights) for decision in decisions]


async def until_weights(router, prompt, expected):
    async with asyncio.timeout(2):
        while (await router.route([prompt]))[0].weights != expected:
            await asyncio.sleep(0.02)


async def test_without_a_router_every_prompt_is_the_bases(root):
    decisions = await Router(str(root)).route(PROMPTS)
    assert decisions == [RoutingDecision({"none": 1.0}, {})] * len(PROMPTS)
    assert await Router(str(root)).route_conversation(PROMPTS) == decisions[0]


async def test_it_decides_as_tiny_ada_and_takes_a_new_one_as_it_is_published(own_root):
    router = Router(str(own_root))
    ada = publish_router(own_root)
    expected = ada.route(PROMPTS)
    assert all(decision.weights for decision in expected)
    await until_weights(router, PROMPTS[0], expected[0].weights)
    assert contents(await router.route(PROMPTS)) == contents(expected)
    assert contents(await Router(str(own_root)).route(PROMPTS)) == contents(expected)


async def test_a_router_with_a_pretrained_encoder_is_served_without_where_it_came_from(own_root, tmp_path):
    folder = tmp_path / "small-bert"
    folder.mkdir()
    ada = publish_router(own_root, str(write_small_bert(folder)))
    shutil.rmtree(folder)
    router = Router(str(own_root))
    assert contents(await router.route(PROMPTS)) == contents(ada.route(PROMPTS))
    assert (await router.route_conversation(PROMPTS)).weights == ada.route_conversation(PROMPTS).weights


async def test_a_damaged_router_is_not_taken(own_root, caplog):
    ada = publish_router(own_root)
    router = Router(str(own_root))
    (own_root / "router/2").mkdir()
    Catalog(own_root).publish(Change(router=2))
    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(5):
            while "could not be followed" not in caplog.text:
                await asyncio.sleep(0.02)
    assert contents(await router.route(PROMPTS)) == contents(ada.route(PROMPTS))
