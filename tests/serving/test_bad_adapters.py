"""Adapters that cannot be served: a clear answer over both wires, and everything else goes on."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import torch

from cluster.lora import peft_format
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.lora.weights import AdapterWeights, Factors
from cluster.messages import AdapterRef
from deployments.protos import zephyra_pb2 as pb
from deployments.protos.zephyra_pb2_grpc import ZephyraStub
from tests.conftest import Served
from tests.nano import nano_base, publish_adapter

pytestmark = pytest.mark.ray


def _of_another_base(root: Path) -> AdapterRef:
    return publish_adapter(root, "foreign", seed=5, base_fingerprint="0" * 16)


def _of_wrong_shapes(root: Path) -> AdapterRef:
    name = "model.layers.0.self_attn.q_proj"
    factors = {name: Factors(torch.ones(2, 7), torch.ones(9, 2), scale=1.0)}
    weights = AdapterWeights(factors, nano_base(root).fingerprint)
    version = write_version(root / "adapters/misshapen", lambda folder: peft_format.save(folder, weights, "nano"))
    Catalog(root).publish(Change(adapters={"misshapen": version}))
    return AdapterRef("misshapen", version)


def _damaged(root: Path) -> AdapterRef:
    ref = publish_adapter(root, "damaged", seed=6)
    file = root / "adapters" / ref.domain / str(ref.version) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return ref


@pytest.fixture
def publish(served: Served) -> Iterator[Callable[[Callable[[Path], AdapterRef]], AdapterRef]]:
    """Publishes on the shared cluster, waits until it is seen there, and withdraws afterwards."""
    published: list[AdapterRef] = []

    def do(make: Callable[[Path], AdapterRef]) -> AdapterRef:
        published.append(make(served.root))
        for _ in range(100):
            models = httpx.get(f"{served.http}/v1/models", timeout=30).json()["data"]
            if any(model["id"] == f"zephyra:{published[-1].domain}" for model in models):
                return published[-1]
            time.sleep(0.05)
        pytest.fail(f"{published[-1]} was published and not seen")

    yield do
    Catalog(served.root).publish(Change(withdrawn=tuple(ref.domain for ref in published)))


@pytest.mark.parametrize(
    ("make", "http_status", "grpc_code", "said"),
    [
        (_of_another_base, 409, grpc.StatusCode.FAILED_PRECONDITION, "was trained on base 0000000000000000"),
        (_of_wrong_shapes, 409, grpc.StatusCode.FAILED_PRECONDITION, "the layer needs A (r, 64)"),
        (_damaged, 500, grpc.StatusCode.DATA_LOSS, "is not what was published"),
    ],
)
def test_it_is_refused_over_both_wires_and_the_others_answer(
    served: Served,
    publish: Callable[[Callable[[Path], AdapterRef]], AdapterRef],
    make: Callable[[Path], AdapterRef],
    http_status: int,
    grpc_code: grpc.StatusCode,
    said: str,
) -> None:
    ref = publish(make)
    url, body = f"{served.http}/v1/completions", {"prompt": "hi", "max_tokens": 4}
    response = httpx.post(url, json={**body, "model": f"zephyra:{ref.domain}"}, timeout=60)
    assert response.status_code == http_status, response.text
    assert said in response.json()["error"]["message"]
    request = pb.GenerateRequest(prompt="hi", domain=ref.domain, sampling=pb.Sampling(max_tokens=4))
    with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        ZephyraStub(channel).Complete(request, timeout=60)
    assert caught.value.code() is grpc_code
    assert said in caught.value.details()
    assert "Traceback" not in response.text + caught.value.details()
    assert httpx.post(url, json={**body, "model": "zephyra:law"}, timeout=60).status_code == 200
