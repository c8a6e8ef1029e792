"""Domains over both wires in one process: the same as the commands do, or nothing at all."""

import json
import pickle
import shutil
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.errors import (
    CatalogConflict,
    IncompatibleAdapter,
    InvalidAdapter,
    InvalidInput,
    UnknownDomain,
    UploadTooLarge,
)
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog
from deployments.api import domains_grpc as wire
from deployments.domains.operations import Domains
from deployments.protos import zephyra_pb2 as pb
from tests.nano import DOMAINS
from tests.serving.handed_in import (
    FORM_FILES,
    REFUSED,
    TAX,
    form_of,
    messages,
    stream_of,
)
from tests.serving.http_client import error_of
from tests.serving.publishing import UPLOAD_BYTES, System, make, stream
from tests.serving.test_grpc import Context

pytestmark = pytest.mark.anyio


def versions_file(file: Path) -> bytes:
    """A file of a version; what it says of when it was added is left out."""
    if file.name == "checksums.json":
        return b""
    content = file.read_bytes()
    if file.name == "zephyra.json":
        ours = json.loads(content)
        ours["metadata"].pop("added_at")
        return json.dumps(ours).encode()
    return content


def version_of(root: Path, domain: str) -> dict[str, bytes]:
    return {file.name: versions_file(file) for file in (root / "adapters" / domain / "1").iterdir()}


@pytest.mark.parametrize("examples", ["text", "file", "json lines", "grpc", "folder"])
async def test_what_is_stored_is_what_the_command_stores(
    template: Path, taught_root: Path, temp: Path, adapter: Path, tmp_path: Path, examples: str
) -> None:
    by_hand = shutil.copytree(template / "root", tmp_path / "by-hand")
    Domains(Store(by_hand)).add("tax", adapter, TAX)
    system = make(taught_root, temp, adapter_folder=str(adapter.parent))
    async with system.client() as client:
        if examples == "grpc":
            answer = await wire.add_domain(system.domains, stream_of("tax", adapter, TAX), Context())
            change = {"name": answer.name, "version": answer.version, "generation": answer.generation}
        else:
            lines = "\n".join(json.dumps({"prompt": text}) for text in TAX)
            sent: dict[str, Any] = {
                "text": {"files": form_of(adapter), "data": {"name": "tax", "examples": "\n".join(TAX)}},
                "file": {"files": {**form_of(adapter), "examples": ("t.txt", "\n".join(TAX))}, "data": {"name": "tax"}},
                "json lines": {"files": {**form_of(adapter), "examples": ("t.jsonl", lines)}, "data": {"name": "tax"}},
                "folder": {"json": {"name": "tax", "adapter_uri": str(adapter), "examples": TAX}},
            }[examples]
            response = await client.post("/v1/domains", **sent)
            assert response.status_code == 201, response.text
            change = response.json()
        assert change["version"] == 1
        assert change["generation"] == Catalog(taught_root).latest()
        assert version_of(taught_root, "tax") == version_of(by_hand, "tax")
        assert Catalog(taught_root).load() == Catalog(by_hand).load()
        assert not [file for file in temp.rglob("*") if file.is_file()]


async def test_a_domain_is_listed_shown_rolled_back_and_removed(
    publishing: System, domains_client: httpx.AsyncClient, adapter: Path
) -> None:
    for version in (1, 2):
        added = await domains_client.post("/v1/domains", files=form_of(adapter), data={"name": "tax"})
        assert added.json()["version"] == version
    whole = (await domains_client.get("/v1/domains", params={"limit": 1000})).json()
    assert [domain["name"] for domain in whole["data"]] == sorted([*DOMAINS, "tax"])
    assert (whole["has_more"], whole["generation"]) == (False, Catalog(publishing.root).latest())
    pages, after, more = [], "", True
    while more:
        page = (await domains_client.get("/v1/domains", params={"limit": 3, "after": after})).json()
        over_grpc = await wire.list_domains(publishing.domains, pb.ListDomainsRequest(limit=3, after=after), Context())
        assert [domain.name for domain in over_grpc.domains] == [domain["name"] for domain in page["data"]]
        pages += page["data"]
        after, more = pages[-1]["name"], page["has_more"]
    assert pages == whole["data"]
    shown = (await domains_client.get("/v1/domains/tax")).json()
    assert shown == {**shown, "version": 2, "versions": [1, 2], "rank": 4, "prototypes": 0}
    assert sum(shown["files"].values()) == shown["bytes"]
    rolled = await domains_client.post("/v1/domains/tax/rollback", json={"version": 1})
    assert (rolled.status_code, rolled.json()["version"]) == (200, 1)
    history = await wire.get_domain(publishing.domains, pb.GetDomainRequest(name="tax"), Context())
    assert (history.domain.version, list(history.versions), dict(history.files)) == (1, [1, 2], shown["files"])
    gone = await domains_client.delete("/v1/domains/tax")
    assert gone.json() == {
        "object": "domain.change",
        "name": "tax",
        "version": None,
        "generation": history.generation + 1,
    }
    missing = await domains_client.get("/v1/domains/tax")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "unknown_domain")
    back = await wire.rollback_domain(publishing.domains, pb.RollbackDomainRequest(name="tax", version=2), Context())
    assert (back.name, back.version) == ("tax", 2)
    removed = await wire.remove_domain(publishing.domains, pb.RemoveDomainRequest(name="tax"), Context())
    assert not removed.HasField("version")
    with pytest.raises(UnknownDomain):
        await wire.get_domain(publishing.domains, pb.GetDomainRequest(name="tax"), Context())


async def test_a_stale_generation_conflicts_and_nothing_is_left(
    publishing: System, domains_client: httpx.AsyncClient, adapter: Path
) -> None:
    before, now = publishing.files(), Catalog(publishing.root).latest()
    stale = {"expected-generation": str(now - 1)}
    form = {"files": form_of(adapter), "data": {"name": "tax"}}
    tries = [
        domains_client.post("/v1/domains", **form, headers=stale),
        domains_client.post("/v1/domains", **{**form, "data": {"name": "tax", "expected_generation": str(now - 1)}}),
        domains_client.delete("/v1/domains/law", headers=stale),
        domains_client.post("/v1/domains/law/rollback", json={"version": 1, "expected_generation": now - 1}),
    ]
    for one in tries:
        response = await one
        assert (response.status_code, error_of(response)["code"]) == (409, "catalog_conflict")
        assert f"at generation {now}, not {now - 1}" in error_of(response)["message"]
    context = Context()
    with pytest.raises(CatalogConflict):
        await wire.add_domain(publishing.domains, stream_of("tax", adapter, expected_generation=now - 1), context)
    assert context.code is grpc.StatusCode.ABORTED
    assert publishing.files() == before
    contradiction = await domains_client.post(
        "/v1/domains/law/rollback", json={"expected_generation": now}, headers=stale
    )
    assert (contradiction.status_code, error_of(contradiction)["code"]) == (400, "invalid_input")
    current = {"expected-generation": str(now)}
    assert (await domains_client.post("/v1/domains", **form, headers=current)).status_code == 201


REFUSALS = {
    "a pickle": (400, InvalidInput),
    "NaN": (400, InvalidAdapter),
    "half a file": (400, InvalidAdapter),
    "a layer that is not there": (409, IncompatibleAdapter),
    "DoRA": (409, IncompatibleAdapter),
    "another base": (409, IncompatibleAdapter),
    "a pickle by another name": (400, InvalidAdapter),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_a_bad_adapter_is_refused_over_both_wires_and_nothing_is_left(
    publishing: System, domains_client: httpx.AsyncClient, adapter: Path, case: str
) -> None:
    status, error = REFUSALS[case]
    before = publishing.files()
    if case in REFUSED:
        REFUSED[case][0](adapter)
    else:
        (adapter / FORM_FILES["adapter_model"]).write_bytes(pickle.dumps({"weights": [0.0] * 100}))
    response = await domains_client.post("/v1/domains", files=form_of(adapter), data={"name": "tax"})
    assert response.status_code == status, response.text
    assert error_of(response)["type"] == "invalid_request_error"
    assert "/" not in error_of(response)["message"], "no path of this machine"
    context = Context()
    with pytest.raises(error):
        await wire.add_domain(publishing.domains, stream_of("tax", adapter), context)
    assert context.details == error_of(response)["message"]
    assert publishing.files() == before


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"data": {"name": "../law"}}, 400, "cannot name a domain"),
        ({"data": {"name": "none"}}, 400, "cannot name a domain"),
        ({"data": {}}, 400, "no field 'name'"),
        ({"data": {"name": "tax", "nmae": "x"}}, 400, "no field 'nmae'"),
        ({"data": {"name": ["tax", "law"]}}, 400, "comes twice"),
        ({"data": {"name": "tax", "adapter_model": "x"}, "files": {"zephyra": b"{}"}}, 400, "is no file"),
        ({"data": {"name": "tax", "data_free": "maybe"}}, 400, "expected true or false"),
        ({"data": {"name": "tax", "expected_generation": "x"}}, 400, "expected a number"),
        ({"data": {"name": "tax", "examples": " \n"}}, 400, "0 examples"),
        ({"data": {"name": "tax"}, "files": {"../law": b"x"}}, 400, "no field '../law'"),
        ({"data": {"name": "tax", "examples": "x" * 2**20 + "x"}}, 400, "sent as files"),
        ({"content": b"nothing", "headers": {"content-type": "multipart/form-data"}, "files": None}, 400, "form"),
        ({"content": b"{", "headers": {"content-type": "application/json"}, "files": None}, 400, "not valid JSON"),
        ({"json": {"name": "tax", "adapter_uri": "x", "more": 1}, "files": None}, 400, "no field 'more'"),
        ({"json": {"name": "tax"}, "files": None}, 400, "adapter_uri"),
        ({"json": {"name": "tax", "adapter_uri": "x" * 2**22}, "files": None}, 413, "larger than 4194304"),
        ({"data": {"name": "tax"}, "files": {"zephyra": b"x" * (UPLOAD_BYTES + 2**17)}}, 413, "upload_bytes"),
        ({"data": {"name": "tax"}, "files": {"zephyra": b"x" * UPLOAD_BYTES, "adapter_config": b"xx"}}, 413, "bytes"),
    ],
    ids=str,
)
async def test_a_bad_form_is_refused_and_nothing_is_left(
    publishing: System, domains_client: httpx.AsyncClient, adapter: Path, change: dict[str, Any], status: int, said: str
) -> None:
    before = publishing.files()
    response = await domains_client.post("/v1/domains", **{"files": form_of(adapter), **change})
    assert response.status_code == status, response.text
    assert said in error_of(response)["message"]
    assert publishing.files() == before


async def test_an_upload_without_end_is_stopped_at_its_limit_and_never_held_in_memory(
    taught_root: Path, temp: Path
) -> None:
    system, sent_bytes = make(taught_root, temp, upload_bytes=2**25), 0
    before = system.files()

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent_bytes
        yield b'--b\r\ncontent-disposition: form-data; name="adapter_model"; filename="x"\r\n\r\n'
        while True:
            sent_bytes += 2**16
            yield bytes(2**16)

    async with system.client() as client:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        tracemalloc.start()
        try:
            response = await client.post("/v1/domains", content=endless(), headers=headers)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (response.status_code, error_of(response)["type"]) == (413, "invalid_request_error")
        assert 2**25 <= sent_bytes <= 2**25 + 2**18
        assert peak_bytes < 2**23
        assert system.files() == before
        other = await client.post("/v1/completions", content=bytes(2**22 + 1), headers=headers)
        assert other.status_code == 413


async def test_grpc_pieces_beyond_the_limits_and_streams_that_break_off_are_refused(
    publishing: System, adapter: Path
) -> None:
    before, whole = publishing.files(), list(messages("tax", adapter))
    cases: list[tuple[list[pb.AddDomainRequest], type[Exception], grpc.StatusCode]] = [
        ([], InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
        (whole[1:], InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
        ([*whole, whole[0]], InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
        ([*whole, pb.AddDomainRequest()], InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
        (
            [whole[0], pb.AddDomainRequest(adapter_model=bytes(2**22))],
            UploadTooLarge,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
        (
            [whole[0], *[pb.AddDomainRequest(zephyra=bytes(2**19))] * 3],
            UploadTooLarge,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
    ]
    for sent, error, code in cases:
        context = Context()
        with pytest.raises(error):
            await wire.add_domain(publishing.domains, stream(sent), context)
        assert context.code is code
    cancelled = stream(whole)
    cancelled.cancel()
    with pytest.raises(InvalidInput, match="before it was complete"):
        await wire.add_domain(publishing.domains, cancelled, Context())
    assert publishing.files() == before


async def test_bad_queries_are_answered_in_openais_shape(domains_client: httpx.AsyncClient) -> None:
    for path, said in (("/v1/domains?limit=0", "limit"), ("/v1/domains?limit=x", "limit")):
        response = await domains_client.get(path)
        assert (response.status_code, said in error_of(response)["message"]) == (400, True)
    late = await domains_client.post("/v1/domains/law/rollback", json={"version": 0})
    assert (late.status_code, error_of(late)["param"]) == (400, "version")
    missing = await domains_client.post("/v1/domains/law/rollback", json={"version": 9})
    assert (missing.status_code, error_of(missing)["code"]) == (404, "unknown_domain")


async def test_the_paths_and_both_forms_of_adding_are_described(domains_client: httpx.AsyncClient) -> None:
    paths = (await domains_client.get("/openapi.json")).json()["paths"]
    assert {method for path in paths if "domains" in path for method in paths[path]} == {"get", "post", "delete"}
    content = paths["/v1/domains"]["post"]["requestBody"]["content"]
    assert set(content["application/json"]["schema"]["properties"]) >= {"name", "adapter_uri", "examples"}
    assert set(content["multipart/form-data"]["schema"]["properties"]) >= {"name", "adapter_model", "examples"}
