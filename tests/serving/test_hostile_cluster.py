"""Clients that mean harm, through Ray's own proxies: refused, and everybody else is answered."""

import http.client
from collections.abc import Iterator

import grpc
import httpx
import pytest

from cluster.lora.catalog import Catalog
from deployments.api.body_limit import MAX_HEADERS
from deployments.application import MAX_GRPC_BYTES
from deployments.protos import zephyra_pb2 as pb
from deployments.protos.zephyra_pb2_grpc import ZephyraStub
from tests.conftest import Served

pytestmark = pytest.mark.ray

BODY = {"prompt": "hi", "model": "base", "max_tokens": 2}
HUNDRED_MB = 100 * 10**6


@pytest.fixture(autouse=True)
def as_it_was(served: Served) -> Iterator[None]:
    """Afterwards the catalog is as it was, and requests are answered."""
    before = Catalog(served.root).load()
    yield
    assert Catalog(served.root).load() == before
    assert httpx.post(f"{served.http}/v1/completions", json=BODY, timeout=60).status_code == 200


def test_thousands_of_headers(served: Served) -> None:
    headers = {f"x-{index}": "y" for index in range(10_000)}
    response = httpx.post(f"{served.http}/v1/completions", json=BODY, headers=headers, timeout=60)
    assert response.status_code == 400
    assert f"the most is {MAX_HEADERS}" in response.json()["error"]["message"]


def test_a_hundred_megabytes_are_refused_before_they_are_sent(served: Served) -> None:
    connection = http.client.HTTPConnection(served.http.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(HUNDRED_MB))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert b"upload_too_large" in response.read()
    connection.close()


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_grpc_message_beyond_the_limit_also_where_it_is_packed_small(
    served: Served, compression: grpc.Compression
) -> None:
    request = pb.GenerateRequest(prompt="x" * (MAX_GRPC_BYTES + 1))
    with grpc.insecure_channel(served.grpc, compression=compression) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            ZephyraStub(channel).Complete(request, timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        request = pb.GenerateRequest(prompt="hi", base=pb.Base(), sampling=pb.Sampling(max_tokens=2))
        assert ZephyraStub(channel).Complete(request, timeout=60).usage.completion_tokens == 2


def test_thousands_of_metadata(served: Served) -> None:
    metadata = [(f"x-{index}", "y") for index in range(10_000)]
    with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        ZephyraStub(channel).Complete(pb.GenerateRequest(prompt="hi"), timeout=60, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
