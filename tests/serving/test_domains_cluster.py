"""Domains added, changed and withdrawn over both wires of a running cluster, which serves them within a second."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.util import list_named_actors

from cluster.config.training import AdapterSettings, LiveDomainSettings, Recipe, StageSettings
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.router.policy import Policy
from deployments.application import APPLICATION_NAME
from deployments.protos import zephyra_pb2 as pb
from deployments.protos.zephyra_pb2_grpc import ZephyraStub
from deployments.train import fit
from tests.conftest import Served
from tests.nano import publish_router
from tests.serving.handed_in import TAX, form_of, messages
from tests.serving.http_client import error_of

pytestmark = pytest.mark.ray

NAME = "tax"
LIVE_S = 1.0


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    ada = publish_router(served.root)
    # One that never says none leaves no room for a domain that is added.
    ada.policy = Policy(threshold=0.0)
    Catalog(served.root).publish(Change(router=write_version(served.root / "router", ada.save)))
    with httpx.Client(base_url=served.http, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def stub(served: Served) -> Iterator[ZephyraStub]:
    with grpc.insecure_channel(served.grpc) as channel:
        yield ZephyraStub(channel)


def live(is_live: Callable[[], bool]) -> float:
    """Seconds until it is. Fails when that takes longer than is promised."""
    start_s = time.monotonic()
    while not is_live():
        assert time.monotonic() - start_s < LIVE_S, "it is not live in time"
        time.sleep(0.02)
    return time.monotonic() - start_s


def generates(client: httpx.Client) -> bool:
    body = {"model": f"zephyra:{NAME}", "prompt": "hi", "max_tokens": 4}
    return client.post("/v1/completions", json=body).status_code == 200


def is_routed(client: httpx.Client) -> bool:
    return client.post("/v1/route", json={"prompt": TAX[0]}).json()["probabilities"].get(NAME, 0.0) > 0.9


def root_files(root: Path) -> set[Path]:
    return {file for file in root.rglob("*") if file.is_file()}


def test_over_http_it_is_added_routed_generated_kept_from_the_stale_and_removed(
    served: Served, client: httpx.Client, adapter: Path
) -> None:
    form: dict[str, Any] = {"files": form_of(adapter), "data": {"name": NAME, "examples": "\n".join(TAX)}}
    added = client.post("/v1/domains", **form)
    assert added.status_code == 201, added.text
    live(lambda: generates(client) and is_routed(client))
    routed = client.post("/v1/completions", json={"prompt": TAX[0], "max_tokens": 4}).json()
    assert routed["zephyra"]["mixture"] == {f"{NAME}@{added.json()['version']}": 1.0}
    shown = client.get(f"/v1/domains/{NAME}").json()
    assert (shown["generation"], shown["problem"]) == (added.json()["generation"], None)
    assert shown["prototypes"] >= 1
    before = root_files(served.root)
    stale = client.post("/v1/domains", **form, headers={"expected-generation": str(shown["generation"] - 1)})
    assert (stale.status_code, error_of(stale)["code"]) == (409, "catalog_conflict")
    bad = client.post("/v1/domains", files={**form_of(adapter), "adapter_model": b"no tensors"}, data={"name": NAME})
    assert (bad.status_code, error_of(bad)["code"]) == (400, "invalid_adapter")
    assert root_files(served.root) == before
    removed = client.delete(f"/v1/domains/{NAME}", headers={"expected-generation": str(shown["generation"])})
    assert removed.status_code == 200, removed.text
    live(lambda: not generates(client))
    gone = client.post("/v1/completions", json={"model": f"zephyra:{NAME}", "prompt": "hi"})
    assert (gone.status_code, error_of(gone)["code"]) == (404, "unknown_domain")
    assert client.get(f"/v1/domains/{NAME}").status_code == 404


def test_over_grpc_the_same(served: Served, client: httpx.Client, stub: ZephyraStub, adapter: Path) -> None:
    added = stub.AddDomain(messages(NAME, adapter, TAX), timeout=60)
    live(lambda: generates(client) and is_routed(client))
    history = stub.GetDomain(pb.GetDomainRequest(name=NAME))
    assert (history.domain.version, history.generation) == (added.version, added.generation)
    listed = client.get("/v1/domains").json()["data"]
    assert [one.name for one in stub.ListDomains(pb.ListDomainsRequest()).domains] == [one["name"] for one in listed]
    before = root_files(served.root)
    with pytest.raises(grpc.RpcError) as caught:
        stub.AddDomain(messages(NAME, adapter, expected_generation=added.generation - 1), timeout=60)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    with pytest.raises(grpc.RpcError) as caught:
        stub.AddDomain(messages("../law", adapter), timeout=60)
    assert (caught.value.code(), "Traceback" in caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, False)
    assert root_files(served.root) == before
    again = stub.AddDomain(messages(NAME, adapter), timeout=60)
    rolled = stub.RollbackDomain(pb.RollbackDomainRequest(name=NAME, expected_generation=again.generation))
    assert rolled.version == added.version
    stub.RemoveDomain(pb.RemoveDomainRequest(name=NAME, expected_generation=rolled.generation))
    live(lambda: not generates(client))
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetDomain(pb.GetDomainRequest(name=NAME))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_large_upload_comes_through_in_pieces(served: Served, client: httpx.Client, adapter: Path) -> None:
    before = root_files(served.root)
    large = {**form_of(adapter), "adapter_model": bytes(24 * 2**20)}
    refused = client.post("/v1/domains", files=large, data={"name": NAME})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_adapter")
    assert root_files(served.root) == before


def test_one_that_is_trained_while_it_serves_is_routed_and_generated(
    served: Served, client: httpx.Client, tmp_path: Path
) -> None:
    # The nano router is too coarse for other wordings: what is held out asks the same.
    rows = {"prompt": TAX * 2, "response": ["See the form.", "In May.", "The second."] * 2}
    pq.write_table(pa.table({**rows, "split": ["train"] * 3 + ["val"] * 3}), tmp_path / "tax.parquet")
    before = {file: file.read_bytes() for file in root_files(served.root)}
    options = AdapterSettings(rank=4, num_steps=8, tokens_per_batch=256, learning_rate=0.01)
    live_settings = LiveDomainSettings(domain=NAME)
    settings = StageSettings(
        root=served.root,
        data=tmp_path / "tax.parquet",
        recipe=Recipe(adapters=options),
        name="nano",
        live=live_settings,
    )
    fit("domain", settings, run_name="tax", num_cpus=0.5)
    live(lambda: generates(client) and is_routed(client))
    assert {file: file.read_bytes() for file in before} == before
    ref = Catalog(served.root).load().ref(NAME)
    routed = client.post("/v1/completions", json={"prompt": TAX[0], "max_tokens": 4}).json()
    assert routed["zephyra"]["mixture"] == {str(ref): 1.0}
    plain = client.post("/v1/completions", json={"prompt": TAX[0], "model": "base", "max_tokens": 4}).json()
    assert routed["choices"][0]["text"] != plain["choices"][0]["text"]
    client.delete(f"/v1/domains/{NAME}")
    live(lambda: not generates(client))


def test_a_publisher_that_is_killed_is_replaced_and_the_rest_goes_on(client: httpx.Client) -> None:
    prefix = f"SERVE_REPLICA::{APPLICATION_NAME}#Publisher#"
    (name,) = [a["name"] for a in list_named_actors(all_namespaces=True) if a["name"].startswith(prefix)]
    ray.kill(ray.get_actor(name, namespace="serve"))
    answer = client.post("/v1/completions", json={"model": "zephyra:law", "prompt": "hi", "max_tokens": 2})
    assert answer.status_code == 200
    assert client.get("/v1/domains").status_code == 200
