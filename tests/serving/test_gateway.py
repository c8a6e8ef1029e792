"""The Gateway over the whole flow in one process: which mixture answers, and what happens when things change."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.config.serving import AppSettings
from cluster.errors import DeadlineExceeded, InvalidMixture, Overloaded, RouterUnavailable, UnknownDomain, UnknownModel
from cluster.lora.catalog import Catalog, Change
from cluster.messages import (
    AdapterRef,
    ChatMessage,
    ClientRequest,
    FinishReason,
    Mixture,
    Role,
    SamplingParams,
    TokenChunk,
)
from deployments.api.gateway import Gateway
from deployments.replica.base_replica import BaseReplica
from deployments.router import SHORT_CHARACTERS, Router
from tests.nano import DOMAINS, publish_adapter, publish_router
from tests.router.small_bert import write_small_bert
from tests.serving.local import GoneHandle, LocalHandle, WordRouter, local_system

pytestmark = pytest.mark.anyio


def ref(domain, version=1):
    return AdapterRef(domain, version)


def request(prompt="hi", model="zephyra", mixture=None, max_tokens=4):
    return ClientRequest(prompt, model, mixture, SamplingParams(max_tokens=max_tokens))


async def ask(gateway, given):
    """The routing and the token ids."""
    answer = await gateway.answer(given)
    async with aclosing(answer):
        return answer.routing, [token async for piece in answer.pieces() for token in piece.chunk.token_ids]


async def until(condition, seconds=5.0, pause_s=0.02):
    end = asyncio.get_running_loop().time() + seconds
    while not await condition():
        assert asyncio.get_running_loop().time() < end, "it did not come to be"
        await asyncio.sleep(pause_s)


@pytest.mark.parametrize(
    ("given", "mixture"),
    [
        (request(model="base"), {}),
        (request(model="zephyra:law"), {ref("law"): 1.0}),
        (request(model="zephyra:law@1"), {ref("law"): 1.0}),
        (request("of law"), {ref("law"): 1.0}),
        (request("law and math"), {ref("law"): 0.5, ref("math"): 0.5}),
        (request("neither"), {}),
        (request("of law", mixture={"math": 2.0, "sql@1": 0.5, "law": 0}), {ref("math"): 2.0, ref("sql"): 0.5}),
        (request("of law", mixture={}), {}),
        (request("of law", model="base", mixture={"math": 1}), {ref("math"): 1.0}),
        (request((ChatMessage(Role.USER, "math"), ChatMessage(Role.USER, "law"))), {ref("law"): 1.0}),
        (request((ChatMessage(Role.USER, "math"), ChatMessage(Role.USER, "and why?"))), {ref("math"): 1.0}),
        (request((ChatMessage(Role.SYSTEM, "math"), ChatMessage(Role.USER, "and why?"))), {}),
    ],
)
async def test_the_mixture_is_what_the_request_or_the_router_says(system, given, mixture):
    routing, tokens = await ask(system.gateway, given)
    assert routing.mixture == Mixture.of(mixture)
    assert len(tokens) == 4
    was_routed = given.mixture is None and given.model == "zephyra"
    assert (routing.probabilities is not None) == was_routed
    assert (routing.routing_ms > 0) == was_routed


async def test_different_mixtures_give_different_tokens(system):
    answers = [(await ask(system.gateway, request(model=model, max_tokens=16)))[1] for model in system.gateway.models()]
    assert len({tuple(tokens) for tokens in [answers[0], *answers[2:]]}) == 4
    # No domain is named in the prompt, so that zephyra is the base.
    assert answers[0] == answers[1]


@pytest.mark.parametrize("model", ["gpt-4", "", "law", "base:law", "Zephyra", "zephyra@1"])
async def test_an_unknown_model_is_refused_even_beside_a_mixture(system, model):
    for mixture in (None, {"law": 1.0}):
        with pytest.raises(UnknownModel, match="zephyra:law"):
            await system.gateway.answer(request(model=model, mixture=mixture))


async def test_a_mixture_names_each_adapter_once(system):
    with pytest.raises(InvalidMixture, match="law@1 twice"):
        await system.gateway.answer(request(mixture={"law": 1.0, "law@1": 1.0}))


async def test_models_are_the_base_the_router_and_one_per_domain(system):
    assert system.gateway.models() == ["base", "zephyra", "zephyra:law", "zephyra:math", "zephyra:sql"]


async def test_a_domain_that_only_the_router_knows_is_left_out(root, system):
    router = LocalHandle(WordRouter([*DOMAINS, "art"]))
    gateway = Gateway(router, LocalHandle(system.replica), str(root))
    assert (await gateway.route("law, math and art")).mixture == Mixture.of({ref("law"): 0.5, ref("math"): 0.5})
    assert (await gateway.route("art")).mixture == Mixture()


async def test_a_domain_that_became_an_alias_is_answered_by_the_one_it_names(own_root):
    ada = publish_router(own_root)
    Catalog(own_root).publish(Change(withdrawn=("math",), aliases={"math": "law"}))
    router = Router(str(own_root))
    prompts = ["solve the equation", "the judge dismissed the appeal", "select name from users"]
    assert [d.weights for d in await router.route(prompts)] == [d.weights for d in ada.route(prompts)]
    gateway = Gateway(LocalHandle(WordRouter(DOMAINS)), GoneHandle(), str(own_root))
    assert (await gateway.route("math")).mixture == Mixture.of({ref("law"): 1.0})
    both = await gateway.route("law, math and sql")
    assert both.mixture == Mixture.of({ref("law"): 2 / 3, ref("sql"): 1 / 3})


async def test_a_chat_is_routed_by_the_users_turns_together(own_root):
    ada = publish_router(own_root)
    gateway = Gateway(LocalHandle(Router(str(own_root))), GoneHandle(), str(own_root))
    turns = ["select name from users", "the judge dismissed the appeal", "and why?"]
    chat = []
    for number, turn in enumerate(turns, start=1):
        chat += [ChatMessage(Role.USER, turn)]
        expected = ada.route_conversation(turns[:number])
        routing = await gateway.route(tuple(chat))
        assert routing.probabilities == expected.probabilities
        assert {entry.domain: weight for entry, weight in routing.mixture.entries} == expected.weights
        chat += [ChatMessage(Role.ASSISTANT, "it is so")]
    alone = await gateway.route("and why?")
    assert alone.probabilities == ada.route(["and why?"])[0].probabilities != routing.probabilities


async def test_what_is_short_is_decided_here_and_only_the_rest_waits_for_the_router(own_root):
    ada = publish_router(own_root)
    here = Router(str(own_root))
    gateway = Gateway(GoneHandle(), GoneHandle(), str(own_root), router_wait_s=0.1, own_router=here)
    (expected,) = ada.route(["the judge dismissed the appeal"])
    assert (await gateway.route("the judge dismissed the appeal")).probabilities == expected.probabilities
    turns = ["select name from users", "and why?"]
    chat = (ChatMessage(Role.USER, turns[0]), ChatMessage(Role.ASSISTANT, "so"), ChatMessage(Role.USER, turns[1]))
    assert (await gateway.route(chat)).probabilities == ada.route_conversation(turns).probabilities
    with pytest.raises(RouterUnavailable):
        await gateway.route("appeal " * SHORT_CHARACTERS)


async def test_a_pretrained_encoder_is_asked_where_it_holds_nobody_up(own_root, tmp_path):
    ada = publish_router(own_root, str(write_small_bert(tmp_path)))
    gateway = Gateway(LocalHandle(Router(str(own_root))), GoneHandle(), str(own_root), own_router=Router(str(own_root)))
    assert Router(str(own_root)).at_hand(["why?"]) is None
    assert (await gateway.route("why?")).probabilities == ada.route(["why?"])[0].probabilities


async def test_a_router_that_does_not_answer_is_an_error_and_others_need_none(root, system):
    gateway = Gateway(GoneHandle(), LocalHandle(system.replica), str(root), router_wait_s=0.1)
    with pytest.raises(RouterUnavailable):
        await gateway.answer(request())
    routing, _ = await ask(gateway, request(model="zephyra:law"))
    assert routing.mixture == Mixture.of({ref("law"): 1.0})


async def test_a_new_version_is_used_within_a_second_and_a_request_in_flight_keeps_its_own(own_root):
    system = local_system(own_root, DOMAINS)
    given = request(model="zephyra:law", max_tokens=300)
    _, before = await ask(system.gateway, given)
    in_flight = await system.gateway.answer(given)
    new = publish_adapter(own_root, "law", seed=7)

    async def is_current():
        return system.gateway.state.adapters["law"] == new.version

    await until(is_current, seconds=1)
    async with aclosing(in_flight):
        tokens = [token async for piece in in_flight.pieces() for token in piece.chunk.token_ids]
    assert (in_flight.routing.mixture, tokens) == (Mixture.of({ref("law"): 1.0}), before)
    routing, after = await ask(system.gateway, given)
    assert routing.mixture == Mixture.of({new: 1.0})
    assert after != before
    assert (await ask(system.gateway, request(model="zephyra:law@1", max_tokens=300)))[1] == before
    system.replica.engine.stop()


async def test_a_withdrawn_domain_is_unknown_within_a_second(own_root):
    system = local_system(own_root, DOMAINS)
    Catalog(own_root).publish(Change(withdrawn=("law",)))

    async def is_gone():
        return "law" not in system.gateway.state.adapters

    await until(is_gone, seconds=1)
    with pytest.raises(UnknownDomain):
        await system.gateway.answer(request(model="zephyra:law"))
    system.replica.engine.stop()


async def test_a_new_base_does_not_take_the_adapters_of_the_one_that_is_served(own_root, caplog):
    system = local_system(own_root, DOMAINS)
    Catalog(own_root).publish(Change(base=2))

    async def is_told():
        return "Base 2 was published" in caplog.text

    await until(is_told)
    routing, _ = await ask(system.gateway, request(model="zephyra:law"))
    assert routing.mixture == Mixture.of({ref("law"): 1.0})
    system.replica.engine.stop()


async def test_a_damaged_generation_leaves_the_last_good_one(own_root, caplog):
    system = local_system(own_root, DOMAINS)
    latest = Catalog(own_root).latest()
    (own_root / "catalog" / f"{latest + 1}.json").write_text("{")

    async def is_told():
        return "could not be followed" in caplog.text

    await until(is_told)
    assert system.gateway.state.generation == latest
    (own_root / "catalog" / f"{latest + 1}.json").unlink()
    publish_adapter(own_root, "law", seed=7)

    async def is_current():
        return system.gateway.state.adapters["law"] == 2

    await until(is_current)
    system.replica.engine.stop()


class ScriptedReplica:
    """Gives each request its own chunks, and remembers the requests and which of their answers were closed early."""

    def __init__(self, scripts):
        self.scripts, self.requests, self.cut_short, self.num_open = list(scripts), [], set(), 0

    async def generate(self, given):
        index = len(self.requests)
        self.requests.append(given)
        self.cut_short.add(index)
        self.num_open += 1
        try:
            for item in self.scripts[index]:
                if isinstance(item, float):
                    await asyncio.sleep(item)
                else:
                    yield item
            self.cut_short.remove(index)
        finally:
            self.num_open -= 1


def gateway_to(root, replica):
    return Gateway(LocalHandle(WordRouter(DOMAINS)), LocalHandle(replica), str(root))


def chunk(token, last=False):
    return TokenChunk((token,), str(token), FinishReason.LENGTH if last else None)


async def test_each_choice_is_a_request_of_its_own_and_goes_on_from_the_seed(root):
    replica = ScriptedReplica([[chunk(i, last=True)] for i in range(3)] * 2)
    gateway = gateway_to(root, replica)
    given = ClientRequest(
        "hi", "base", None, SamplingParams(seed=2**63 - 2, temperature=1.0), num_choices=3, priority=4, timeout_s=9.0
    )
    for seeds, asked in (
        ([2**63 - 2, 2**63 - 1, 0], given),
        ([None] * 3, replace(given, sampling=SamplingParams())),
    ):
        replica.requests.clear()
        answer = await gateway.answer(asked)
        async with aclosing(answer):
            pieces = [piece async for piece in answer.pieces()]
        assert sorted(piece.index for piece in pieces) == [0, 1, 2]
        assert [one.sampling.seed for one in replica.requests] == seeds
        assert len({one.request_id for one in replica.requests}) == 3
        assert {(one.prompt, one.priority) for one in replica.requests} == {("hi", 4)}
        assert all(8.0 < one.timeout_s <= 9.0 for one in replica.requests)


async def test_choices_come_as_they_are_made_and_in_their_own_order(root):
    slow, fast = [chunk(1), 0.2, chunk(2, last=True)], [chunk(3), chunk(4), chunk(5, last=True)]
    answer = await gateway_to(root, ScriptedReplica([slow, fast])).answer(ClientRequest("hi", "base", num_choices=2))
    async with aclosing(answer):
        seen = [(piece.index, *piece.chunk.token_ids) async for piece in answer.pieces()]
    assert [token for index, token in seen if index == 0] == [1, 2]
    assert [token for index, token in seen if index == 1] == [3, 4, 5]
    assert seen[-1] == (0, 2)


@pytest.mark.parametrize("others", [[chunk(1), 60.0, chunk(2, last=True)], [60.0, chunk(1, last=True)]])
async def test_a_choice_that_fails_ends_all(root, others):
    replica = ScriptedReplica([others, [0.05, Overloaded("No more.")], others])
    gateway = gateway_to(root, replica)
    with pytest.raises(Overloaded):
        async with aclosing(await gateway.answer(ClientRequest("hi", "base", num_choices=3))) as answer:
            assert [piece.chunk.token_ids async for piece in answer.pieces()] == [(1,), (1,)]

    async def all_are_over():
        return replica.num_open == 0

    await until(all_are_over)
    assert {0, 2} <= replica.cut_short


async def test_closing_an_answer_of_many_choices_reaches_the_engine(system):
    given = replace(request(model="base", max_tokens=2000), num_choices=4)
    async with aclosing(await system.gateway.answer(given)):
        stats = await system.replica.stats()
        assert stats.num_running + stats.num_waiting == 4

    async def is_idle():
        stats = await system.replica.stats()
        return stats.num_running + stats.num_waiting == 0

    await until(is_idle)
    assert (await system.replica.stats()).num_finished == 0


async def test_a_choice_is_the_answer_to_its_seed_alone(system):
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=5)
    given = ClientRequest("of law", sampling=sampling, num_choices=3)
    answer = await system.gateway.answer(given)
    tokens = [[], [], []]
    async with aclosing(answer):
        async for piece in answer.pieces():
            tokens[piece.index] += piece.chunk.token_ids
    alone = [
        (await ask(system.gateway, ClientRequest("of law", sampling=replace(sampling, seed=5 + index))))[1]
        for index in range(3)
    ]
    assert tokens == alone
    assert tokens[0] != tokens[1] != tokens[2]


class SlowRouter(WordRouter):
    """Takes its time."""

    async def route(self, texts):
        await asyncio.sleep(0.1)
        return await super().route(texts)


async def test_time_that_routing_used_up_is_not_given_again(root):
    replica = ScriptedReplica([[chunk(1, last=True)]])
    gateway = Gateway(LocalHandle(SlowRouter(DOMAINS)), LocalHandle(replica), str(root))
    with pytest.raises(DeadlineExceeded, match=r"timeout_s of 0\.05"):
        await gateway.answer(ClientRequest("hi", timeout_s=0.05))
    assert replica.requests == []
    async with aclosing(await gateway.answer(ClientRequest("hi", timeout_s=5))):
        assert replica.requests[0].timeout_s < 4.9


async def test_a_deadline_ends_all_choices_in_the_engine(system):
    given = ClientRequest("hi", "base", sampling=SamplingParams(max_tokens=3900), num_choices=2, timeout_s=0.3)
    with pytest.raises(DeadlineExceeded):
        await ask(system.gateway, given)

    async def is_idle():
        stats = await system.replica.stats()
        return stats.num_running + stats.num_waiting == 0

    await until(is_idle, seconds=1)


async def test_closing_an_answer_reaches_the_engine(system):
    async with aclosing(await system.gateway.answer(request(model="base", max_tokens=400))):
        assert (await system.replica.stats()).num_running == 1

    async def is_idle():
        return (await system.replica.stats()).num_running == 0

    await until(is_idle)
    assert (await system.replica.stats()).num_generated_tokens < 400


async def test_cancelling_a_request_before_its_first_token_reaches_the_engine(root):
    replica = BaseReplica(GoneHandle(), AppSettings(root=str(root), threads=1))
    gateway = Gateway(LocalHandle(WordRouter(DOMAINS)), LocalHandle(replica), str(root))
    task = asyncio.ensure_future(gateway.answer(request(model="zephyra:law")))

    async def is_waiting():
        return (await replica.stats()).num_waiting == 1

    await until(is_waiting)
    task.cancel()

    async def is_idle():
        return (await replica.stats()).num_waiting == 0

    await until(is_idle)
    replica.engine.stop()
