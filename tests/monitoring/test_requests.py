"""What a request leaves behind in the metrics, from the Gateway to the slots, and feedback over HTTP."""

import json
from contextlib import aclosing

import httpx
import pytest

from cluster.errors import UnknownDomain, UnknownModel
from cluster.lora.artifacts import Store
from cluster.messages import NONE_DOMAIN, ClientRequest, SamplingParams
from deployments.monitoring.metrics import (
    ACCURACY,
    ADAPTER_LOADS,
    ADAPTERS_RESIDENT,
    CALIBRATION,
    ERRORS,
    FIRST_TOKEN,
    MIXTURE_SIZE,
    PER_TOKEN,
    REQUESTS,
    ROUTING,
    ROUTING_SHARE,
    TOKENS,
)
from deployments.monitoring.monitor import UNROUTED, Monitor
from deployments.monitoring.probes import PROBES_FILE, Prober, read_probes
from deployments.monitoring.replica_report import ReplicaReport
from tests.monitoring.ledger import Ledger
from tests.nano import DOMAINS
from tests.serving.http_client import client_of, error_of
from tests.serving.local import local_system

pytestmark = pytest.mark.anyio


@pytest.fixture
async def system(root):
    system = local_system(root, DOMAINS)
    system.gateway.monitor, system.replica._report = Monitor(Ledger()), ReplicaReport(Ledger())
    yield system
    system.replica.engine.stop()


async def answered(gateway, request):
    answer = await gateway.answer(request)
    async with aclosing(answer):
        return sum([len(piece.chunk.token_ids) async for piece in answer.pieces()])


async def test_a_request_is_counted_under_its_heaviest_domain(system):
    gateway, ledger = system.gateway, system.gateway.monitor.sink
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    assert await answered(gateway, ClientRequest("law and math", sampling=sampling)) == 5
    assert await answered(gateway, ClientRequest("x", mixture={"sql": 3, "law": 1}, num_choices=2, sampling=sampling))
    assert await answered(gateway, ClientRequest("x", model="base", sampling=sampling)) == 5
    assert [ledger.sum(REQUESTS, label) for label in ("law", "sql", "base")] == [1, 1, 1]
    assert [ledger.sum(TOKENS, label) for label in ("law", "sql", "base")] == [5, 10, 5]
    assert [ledger.sum(MIXTURE_SIZE, label) for label in ("law", "sql", "base")] == [2, 2, 0]
    assert ledger.count(ROUTING) == ledger.count(ROUTING_SHARE) == 1
    assert 0 < ledger.sum(ROUTING_SHARE) == ledger.sum(ROUTING) / ledger.sum(FIRST_TOKEN, "law") < 1
    assert ledger.sum(PER_TOKEN, "law") >= 0


async def test_errors_are_counted_by_class_and_a_client_that_left_is_a_request(system):
    gateway, ledger = system.gateway, system.gateway.monitor.sink
    for request, error in (
        (ClientRequest("x", model="gpt"), UnknownModel),
        (ClientRequest("x", model="zephyra:tax"), UnknownDomain),
    ):
        with pytest.raises(error):
            await gateway.answer(request)
        assert ledger.sum(ERRORS, UNROUTED, error.__name__) == 1
    answer = await gateway.answer(ClientRequest("law", sampling=SamplingParams(max_tokens=1000, ignore_eos=True)))
    await answer.aclose()
    await answer.aclose()
    assert ledger.sum(REQUESTS, "law") == 1
    assert 1 <= ledger.sum(TOKENS, "law") < 1000


async def test_loads_and_residency_are_told_by_the_replica(system):
    ledger = system.replica._report._sink
    for _ in range(2):
        await answered(system.gateway, ClientRequest("law and math"))
    assert [ledger.sum(ADAPTER_LOADS, domain) for domain in DOMAINS] == [1, 1, 0]
    await system.replica.check_health()
    await system.replica._telling
    assert [ledger.sum(ADAPTERS_RESIDENT, domain) for domain in DOMAINS] == [1, 1, 0]


async def test_feedback_over_http(system):
    async with client_of(system.gateway) as client:
        routed = (await client.post("/v1/route", json={"prompt": "law"})).json()
        completed = (await client.post("/v1/completions", json={"prompt": "math", "max_tokens": 1})).json()["zephyra"]
        said = await _feedback(client, routed["request_id"], "law")
        assert (said.status_code, said.json()) == (200, {"routed": "law", "right": True})
        assert (await _feedback(client, completed["request_id"], "none")).json() == {"routed": "math", "right": False}
        again = await _feedback(client, routed["request_id"], "law")
        assert (again.status_code, error_of(again)["code"]) == (404, "unknown_request")
        unknown = await _feedback(client, routed["request_id"], "tax")
        assert (unknown.status_code, error_of(unknown)["code"]) == (404, "unknown_domain")
        bad = await client.post("/v1/feedback", json={"request": "x"})
        assert (bad.status_code, error_of(bad)["type"]) == (400, "invalid_request_error")
    ledger = system.gateway.monitor.sink
    assert ledger.sum(ACCURACY, "law", "feedback") == 1
    assert ledger.sum(ACCURACY, NONE_DOMAIN, "feedback") == 0
    assert ledger.sum(CALIBRATION, "feedback") == 0.5


def _feedback(client: httpx.AsyncClient, request_id: str, domain: str):
    return client.post("/v1/feedback", json={"request_id": request_id, "domain": domain})


async def test_probes_of_the_root_are_scored(system, own_root):
    gateway, store = system.gateway, Store(own_root)
    assert read_probes(store, gateway.state) == [], "adapters without examples"
    probes = [("law", "law"), ("math", "law"), ("?", "none")]
    lines = [json.dumps({"prompt": prompt, "domain": domain}) for prompt, domain in probes]
    (own_root / PROBES_FILE).write_text("\n".join(lines))
    monitor = gateway.monitor
    prober = Prober(store, lambda: gateway.state, gateway._decisions, monitor.probes)
    assert await prober.score() == 3
    assert monitor.sink.sum(ACCURACY, "law", "probe") == 0.5
    assert monitor.sink.sum(ACCURACY, NONE_DOMAIN, "probe") == 1
    assert monitor.sink.sum(CALIBRATION, "probe") == pytest.approx(1 / 3)
