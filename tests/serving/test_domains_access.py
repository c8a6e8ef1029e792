"""Who may change domains over the network, and what the network may make a server read."""

import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from cluster.errors import (
    PeerRefused,
)
from deployments.api import domains_grpc as wire
from deployments.api.access import Access
from deployments.protos import zephyra_pb2 as pb
from tests.serving.handed_in import (
    TAX,
    form_of,
    stream_of,
)
from tests.serving.http_client import error_of
from tests.serving.publishing import System, make, stream
from tests.serving.test_grpc import Context

pytestmark = pytest.mark.anyio


async def test_only_folders_below_the_allowed_one_are_read(
    taught_root: Path, temp: Path, adapter: Path, tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    shutil.copytree(adapter, allowed / "tax")
    (allowed / "link").symlink_to(adapter)
    closed, system = make(taught_root, temp), make(taught_root, temp, adapter_folder=str(allowed))
    before = system.files()
    async with closed.client() as client:
        refused = await client.post("/v1/domains", json={"name": "tax", "adapter_uri": str(allowed / "tax")})
        assert (refused.status_code, "No folder is open" in error_of(refused)["message"]) == (400, True)
    async with system.client() as client:
        said = set()
        for uri in (str(adapter), "../peft", f"{allowed}/../peft", "link", f"file://{adapter}", "nowhere", "/", "a\0b"):
            refused = await client.post("/v1/load_lora_adapter", json={"lora_name": "tax", "lora_path": uri})
            assert refused.status_code == 400
            said.add(error_of(refused)["message"].replace(repr(uri), ""))
        assert len(said) == 1, "what is there and what is not look the same"
        assert system.files() == before
        for uri in (str(allowed / "tax"), f"file://{allowed}/tax", "tax"):
            loaded = await client.post("/v1/load_lora_adapter", json={"lora_name": "tax", "lora_path": uri})
            assert (loaded.status_code, "Success" in loaded.text) == (200, True), loaded.text
        request = pb.AddDomainRequest(domain=pb.NewDomain(name="tax", adapter_uri="tax", examples=TAX))
        assert (await wire.add_domain(system.domains, stream([request]), Context())).version == 4
        unloaded = await client.post("/v1/unload_lora_adapter", json={"lora_name": "tax"})
        assert (unloaded.status_code, "Success" in unloaded.text) == (200, True)
        again = await client.post("/v1/unload_lora_adapter", json={"lora_name": "tax"})
        assert (again.status_code, error_of(again)["code"]) == (404, "unknown_domain")


@pytest.mark.parametrize(
    ("where", "headers"),
    [
        ({"peer": "10.0.0.7"}, {}),
        ({"base_url": "http://evil.example"}, {}),
        ({}, {"origin": "https://evil.example"}),
        ({}, {"origin": "null"}),
    ],
)
@pytest.mark.parametrize("insecure", [False, True])
async def test_others_than_this_machine_may_look_if_at_all_and_not_change(
    publishing: System, adapter: Path, where: dict[str, str], headers: dict[str, str], insecure: bool
) -> None:
    before = publishing.files()
    async with publishing.client(**where, access=Access(insecure=insecure)) as client:
        assert (await client.get("/v1/domains", headers=headers)).status_code == (200 if insecure else 403)
        for method, path, sent in (
            ("POST", "/v1/domains", {"files": form_of(adapter), "data": {"name": "tax"}}),
            ("DELETE", "/v1/domains/law", {}),
            ("POST", "/v1/domains/law/rollback", {"json": {}}),
            ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "a", "lora_path": "b"}}),
            ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": "law"}}),
        ):
            response = await client.request(method, path, headers=headers, **sent)
            assert (response.status_code, error_of(response)["code"]) == (403, "peer_refused")
    assert publishing.files() == before


async def test_changes_may_be_turned_off(taught_root: Path, temp: Path, adapter: Path) -> None:
    system = make(taught_root, temp, domain_changes=False)
    before, context = system.files(), Context()
    async with system.client() as client:
        response = await client.delete("/v1/domains/law")
        assert (response.status_code, "zephyra domains" in error_of(response)["message"]) == (403, True)
    with pytest.raises(PeerRefused):
        await wire.add_domain(system.domains, stream_of("tax", adapter), context)
    assert context.code is grpc.StatusCode.PERMISSION_DENIED
    assert system.files() == before


def test_the_gateway_does_not_import_transformers() -> None:
    code = "import sys, deployments.api.ingress; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
