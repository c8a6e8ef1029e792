"""On a real cluster: feedback over gRPC, and what Ray exports beside what clients saw."""

import time

import grpc
import httpx
import pytest
import ray

from deployments.monitoring.metrics import KV_USED, REQUESTS, TOKENS
from deployments.protos import zephyra_pb2 as pb
from deployments.protos.zephyra_pb2_grpc import ZephyraStub

pytestmark = pytest.mark.ray


def exported():
    """Prometheus' text, of all nodes."""
    addresses = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    return "".join(httpx.get(f"http://{address}/metrics", timeout=30).text for address in addresses)


def value(metric, **labels):
    """The sum of its series that have these labels."""
    wanted = [f'{name}="{label}"' for name, label in labels.items()]
    lines = [line for line in exported().splitlines() if line.startswith(metric.exported[0] + "{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(part in line for part in wanted))


def test_feedback_over_grpc_counts_once(served):
    with grpc.insecure_channel(served.grpc) as channel:
        stub = ZephyraStub(channel)
        routing = stub.Route(pb.RouteRequest(prompt="hi"))
        request = pb.FeedbackRequest(request_id=routing.request_id, domain="law")
        reply = stub.Feedback(request)
        heaviest = max(routing.mixture.entries, key=lambda entry: entry.weight, default=None)
        assert reply.routed == ("none" if heaviest is None else heaviest.domain)
        assert reply.right == (reply.routed == "law")
        for wrong in (request, pb.FeedbackRequest(request_id=routing.request_id, domain="tax")):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Feedback(wrong)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_ray_exports_what_was_counted(served):
    before = value(REQUESTS, domain="sql"), value(TOKENS, domain="sql")
    for _ in range(3):
        body = {"prompt": "x", "model": "zephyra:sql", "max_tokens": 7, "ignore_eos": True}
        assert httpx.post(f"{served.http}/v1/completions", json=body, timeout=60).status_code == 200
    end_s = time.monotonic() + 40
    while value(TOKENS, domain="sql") < before[1] + 21:
        assert time.monotonic() < end_s, "the counts never came"
        time.sleep(0.25)
    assert value(REQUESTS, domain="sql", deployment="Gateway") == before[0] + 3
    assert KV_USED.exported[0] in exported()
