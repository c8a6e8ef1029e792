"""The engine's thread: the same tokens as a plain loop over `step`, whatever comes and goes beside them."""

import asyncio
from contextlib import aclosing

import pytest

from cluster.config.serving import EngineSettings
from cluster.engine.engine import Engine
from cluster.errors import AdapterUnavailable, IncompatibleAdapter, PromptTooLong, ReplicaLost, ZephyraError
from cluster.lora.packed_adapter import pack
from cluster.lora.peft_format import unpack
from cluster.messages import AdapterRef, FinishReason, GenerateRequest, Mixture, SamplingParams
from deployments.replica import engine_loop
from deployments.replica.engine_loop import EngineLoop
from tests.nano import nano_base, publish_adapter

pytestmark = pytest.mark.anyio

LAW, MATH = AdapterRef("law", 1), AdapterRef("math", 1)
MIXTURES = (Mixture(), Mixture.of({LAW: 1.0}), Mixture.of({MATH: 0.5}), Mixture.of({LAW: 0.25, MATH: 0.75}))


def load(root, ref):
    base = nano_base(root)
    return unpack(pack(root / "adapters" / ref.domain / str(ref.version)), base.model.dtype)


class Disk:
    """Fetches adapters from the root, waiting for `gate`; remembers every ask."""

    def __init__(self, root):
        self.root, self.asked, self.gate = root, [], asyncio.Event()
        self.gate.set()
        self.failures = {}

    async def fetch(self, refs):
        self.asked.append(refs)
        await self.gate.wait()
        for ref in refs:
            yield ref, self.failures.get(ref) or await asyncio.to_thread(load, self.root, ref)


class BrokenEngine(Engine):
    """Fails at its third step."""

    def step(self):
        if self.stats().num_steps == 2:
            raise RuntimeError("a bug")
        return super().step()


@pytest.fixture
async def disk(root):
    return Disk(root)


@pytest.fixture
async def loop(root, disk):
    loop = EngineLoop(Engine(nano_base(root), EngineSettings()), disk.fetch)
    yield loop
    loop.stop()


def request(request_id, mixture=MIXTURES[0], prompt="What is 7 times 6?", **sampling):
    return GenerateRequest(request_id, prompt, mixture, SamplingParams(**{"max_tokens": 12, **sampling}))


async def answer(loop, given):
    return [chunk async for chunk in loop.generate(given)]


def token_ids(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


def stepped(root, given):
    """The slow reference: one request alone, stepped by hand."""
    engine = Engine(nano_base(root), EngineSettings())
    for ref in given.mixture.refs:
        engine.add_adapter(ref, load(root, ref))
    engine.submit(given)
    chunks = []
    while engine.has_work:
        chunks += [output.chunk for output in engine.step()]
    return chunks


async def settled(loop):
    """The stats, once nothing runs or waits."""
    for _ in range(200):
        stats = await loop.stats()
        if stats.num_running == stats.num_waiting == 0:
            return stats
        await asyncio.sleep(0.02)
    raise AssertionError(f"still at work after 4 s: {stats}")


async def test_answers_equal_those_of_a_plain_loop_over_step(root, loop):
    requests = [request(f"r{i}", mixture) for i, mixture in enumerate(MIXTURES)]
    answers = await asyncio.gather(*(answer(loop, given) for given in requests))
    for given, chunks in zip(requests, answers, strict=True):
        expected = stepped(root, given)
        assert token_ids(chunks) == token_ids(expected)
        assert "".join(c.text for c in chunks) == "".join(c.text for c in expected)
        assert (chunks[-1].finish_reason, chunks[-1].prompt_tokens) == (FinishReason.LENGTH, expected[-1].prompt_tokens)


async def test_others_decode_while_an_adapter_is_on_its_way(loop, disk):
    disk.gate.clear()
    waiting = asyncio.ensure_future(answer(loop, request("slow", MIXTURES[1])))
    chunks = await answer(loop, request("base"))
    assert len(token_ids(chunks)) == 12
    assert not waiting.done()
    disk.gate.set()
    assert len(token_ids(await waiting)) == 12


async def test_an_adapter_is_asked_for_once_however_many_wait_for_it(loop, disk):
    disk.gate.clear()
    waiting = [asyncio.ensure_future(answer(loop, request(f"r{i}", MIXTURES[1]))) for i in range(5)]
    await answer(loop, request("base"))
    disk.gate.set()
    await asyncio.gather(*waiting)
    assert disk.asked == [(LAW,)]


async def test_what_finds_no_room_yet_is_announced_while_others_decode(root, disk):
    announced = []
    budget = load(root, LAW).num_bytes * 3 // 2
    engine = Engine(nano_base(root), EngineSettings(adapter_bytes=budget))
    loop = EngineLoop(engine, disk.fetch, announced.append)
    await answer(loop, request("known", MIXTURES[2]))
    long = asyncio.ensure_future(answer(loop, request("runs", MIXTURES[1], max_tokens=300)))
    while LAW not in loop.resident:
        await asyncio.sleep(0.005)
    assert loop.num_unanswered == 1
    waits = asyncio.ensure_future(answer(loop, request("waits", MIXTURES[2])))
    while announced[-1:] != [(MATH,)]:
        await asyncio.sleep(0.005)
    assert not long.done()
    await asyncio.gather(long, waits)
    assert disk.asked == [(MATH,), (LAW,), (MATH,)]
    assert announced[-1] == ()
    assert (loop.resident, loop.num_unanswered) == ((MATH,), 0)
    loop.stop()


async def test_a_failed_fetch_fails_those_who_need_it_and_is_tried_again_later(loop, disk):
    disk.failures[LAW] = AdapterUnavailable("Shard 0 is away.")
    failing, good = await asyncio.gather(
        answer(loop, request("law", MIXTURES[3])), answer(loop, request("math", MIXTURES[2])), return_exceptions=True
    )
    assert isinstance(failing, AdapterUnavailable)
    assert len(token_ids(good)) == 12
    del disk.failures[LAW]
    assert len(token_ids(await answer(loop, request("again", MIXTURES[3])))) == 12


async def test_a_fetch_that_gives_nothing_or_breaks_fails_its_requests(root):
    async def nothing(refs):
        for ref in ():
            yield ref

    async def broken(refs):
        raise RuntimeError("a bug")
        yield

    for fetch in (nothing, broken):
        loop = EngineLoop(Engine(nano_base(root), EngineSettings()), fetch)
        with pytest.raises(AdapterUnavailable):
            await asyncio.wait_for(answer(loop, request("law", MIXTURES[1])), 10)
        loop.stop()


async def test_an_adapter_of_another_base_fails_its_requests(own_root):
    ref = publish_adapter(own_root, "law", seed=9, base_fingerprint="0" * 16)
    loop = EngineLoop(Engine(nano_base(own_root), EngineSettings()), Disk(own_root).fetch)
    with pytest.raises(IncompatibleAdapter):
        await answer(loop, request("law", Mixture.of({ref: 1.0})))
    assert len(token_ids(await answer(loop, request("base")))) == 12
    loop.stop()


async def test_what_submit_raises_reaches_the_caller(loop):
    with pytest.raises(PromptTooLong):
        await answer(loop, request("long", max_tokens=10**6))
    assert (await loop.stats()).num_waiting == 0


async def test_closing_an_answer_early_frees_its_place(loop):
    async with aclosing(loop.generate(request("left", max_tokens=400))) as chunks:
        await anext(chunks)
        assert (await loop.stats()).num_running == 1
    stats = await settled(loop)
    assert stats.num_generated_tokens < 400


async def test_a_client_that_leaves_while_waiting_for_an_adapter_is_forgotten(loop, disk):
    disk.gate.clear()
    task = asyncio.ensure_future(answer(loop, request("left", MIXTURES[1])))
    while not disk.asked:
        await asyncio.sleep(0.01)
    task.cancel()
    assert (await settled(loop)).num_generated_tokens == 0
    disk.gate.set()
    assert len(token_ids(await answer(loop, request("next", MIXTURES[1])))) == 12


async def test_a_slow_reader_gets_everything_in_fewer_chunks(root, loop):
    given = request("slow", max_tokens=60, logprobs=0)
    chunks = []
    async with aclosing(loop.generate(given)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            await asyncio.sleep(0.05)
    expected = stepped(root, given)
    assert token_ids(chunks) == token_ids(expected)
    assert [report.token_id for chunk in chunks for report in chunk.logprobs] == token_ids(expected)
    assert len(chunks) < len(expected)
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_an_engine_that_breaks_fails_all_its_requests_and_says_so(root, disk):
    loop = EngineLoop(BrokenEngine(nano_base(root), EngineSettings()), disk.fetch)
    results = await asyncio.gather(*(answer(loop, request(f"r{i}")) for i in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [ReplicaLost] * 3
    assert isinstance(loop.failure, RuntimeError)
    with pytest.raises(ZephyraError):
        await answer(loop, request("late"))
    with pytest.raises(ReplicaLost):
        await loop.stats()


class WatchedEngine(Engine):
    """Counts how often it looked at itself."""

    num_checks = 0

    def check_integrity(self):
        super().check_integrity()
        self.num_checks += 1


@pytest.mark.parametrize(("idle_s", "num_checks"), [(60.0, 0), (0.01, 1)])
async def test_an_engine_looks_at_itself_once_when_it_stays_idle(root, monkeypatch, idle_s, num_checks):
    monkeypatch.setattr(engine_loop, "_IDLE_S", idle_s)
    engine = WatchedEngine(nano_base(root), EngineSettings())
    loop = EngineLoop(engine, Disk(root).fetch)
    assert await answer(loop, request("before"))
    before = engine.num_checks
    assert await answer(loop, request("after"))
    for _ in range(50):
        await asyncio.sleep(0.02)
        if engine.num_checks > before:
            break
    settled_checks = engine.num_checks
    await asyncio.sleep(0.1)
    assert engine.num_checks == settled_checks, "once for all the time that it is idle"
    assert min(settled_checks - before, 1) == num_checks
    loop.stop()
