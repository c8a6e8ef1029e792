"""Every route and every method, for every kind of caller: against a table that is written down here by hand."""

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from cluster.config.serving import AppSettings
from cluster.errors import InvalidKey, PeerRefused, ZephyraError
from deployments.api.access import CALL_ROLES, Access
from deployments.api.gate import OPEN_PATHS
from deployments.api.ingress import Ingress
from deployments.api.keys import CHECK_S, Keys, Role, add_key, remove_key
from deployments.protos import zephyra_pb2 as pb
from tests.nano import DOMAINS
from tests.serving.http_client import error_of
from tests.serving.local import LocalHandle, LocalSystem, WordRouter
from tests.serving.publishing import System, make, stream
from tests.serving.test_grpc import Context

pytestmark = pytest.mark.anyio

ROUTES = {
    ("GET", "/health"): "anybody",
    ("GET", "/v1/models"): "infer",
    ("POST", "/v1/completions"): "infer",
    ("POST", "/v1/chat/completions"): "infer",
    ("POST", "/v1/route"): "infer",
    ("POST", "/v1/classify"): "infer",
    ("POST", "/v1/feedback"): "infer",
    ("GET", "/v1/domains"): "infer",
    ("GET", "/v1/domains/{name}"): "infer",
    ("POST", "/v1/domains"): "admin",
    ("DELETE", "/v1/domains/{name}"): "admin",
    ("POST", "/v1/domains/{name}/rollback"): "admin",
    ("POST", "/v1/load_lora_adapter"): "admin",
    ("POST", "/v1/unload_lora_adapter"): "admin",
}
METHODS = {
    "Generate": "infer",
    "Complete": "infer",
    "Route": "infer",
    "Classify": "infer",
    "Feedback": "infer",
    "ListDomains": "infer",
    "GetDomain": "infer",
    "AddDomain": "admin",
    "RemoveDomain": "admin",
    "RollbackDomain": "admin",
}
MAY = {"nobody": {"anybody"}, "infer": {"anybody", "infer"}, "admin": {"anybody", "infer", "admin"}}
FOREIGN = "ipv4:10.0.0.7:5000"


@dataclasses.dataclass(frozen=True)
class Callers:
    """A file of keys, and what several callers send as `authorization`."""

    file: Path
    sent: dict[str, tuple[str, list[str]]]
    """By what they are: whose rights they have, and their values."""


@pytest.fixture
def callers(tmp_path: Path) -> Callers:
    file = tmp_path / "keys.json"
    infer, admin, revoked = (
        add_key(file, name, role) for name, role in (("i", Role.INFER), ("a", Role.ADMIN), ("r", Role.ADMIN))
    )
    remove_key(file, "r")
    sent = {
        "none": ("nobody", []),
        "no scheme": ("nobody", [admin]),
        "another scheme": ("nobody", [f"Basic {admin}"]),
        "an empty one": ("nobody", ["Bearer "]),
        "a wrong one": ("nobody", [f"Bearer {admin[:-2]}xx"]),
        "a revoked one": ("nobody", [f"Bearer {revoked}"]),
        "two": ("nobody", [f"Bearer {admin}", f"Bearer {infer}"]),
        "infer": ("infer", [f"Bearer {infer}"]),
        "infer, in small letters": ("infer", [f"bearer  {infer}"]),
        "admin": ("admin", [f"Bearer {admin}"]),
    }
    return Callers(file, sent)


@pytest.fixture
async def whole(root: Path, temp: Path, system: LocalSystem) -> System:
    """Everything that a request may reach; what they ask here is never possible, so that nothing is changed."""
    return dataclasses.replace(make(root, temp), gateway=system.gateway)


async def test_every_route_lets_in_whom_the_table_says(whole: System, callers: Callers) -> None:
    access = Access(Keys(callers.file))
    seen, expected = {}, {}
    # From elsewhere, since with keys it does not matter where a caller is.
    async with whole.client("10.0.0.7", "http://zephyra.example", access) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == ROUTES.keys()
        for who, (rights, values) in callers.sent.items():
            headers = [("authorization", value) for value in values]
            for (method, path), needed in ROUTES.items():
                sent = {"json": {}} if method == "POST" else {}
                response = await client.request(method, path.format(name="nowhere"), headers=headers, **sent)
                seen[who, method, path] = response.status_code if response.status_code in (401, 403) else "let in"
                refused = 401 if rights == "nobody" else 403
                expected[who, method, path] = "let in" if needed in MAY[rights] else refused
                assert response.status_code < 500, response.text
                assert (response.headers.get("www-authenticate") == "Bearer") == (response.status_code == 401)
                if response.status_code in (401, 403):
                    error = error_of(response)
                    code = {401: "invalid_api_key", 403: "role_refused"}[response.status_code]
                    kind = {401: "invalid_request_error", 403: "permission_error"}[response.status_code]
                    assert (error["code"], error["type"], "zk-" in error["message"]) == (code, kind, False)
            unknown = await client.get("/v1/nowhere", headers=headers)
            assert unknown.status_code == (401 if rights == "nobody" else 404)
        for path in OPEN_PATHS - {"/health"}:
            assert (await client.get(path)).status_code == 200
    assert seen == expected


async def test_without_a_key_a_body_is_not_even_read(whole: System, callers: Callers) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        pytest.fail("it was read")

    async with whole.client(access=Access(Keys(callers.file))) as client:
        for path in ("/v1/completions", "/v1/domains"):
            # ASGITransport reads what the application asks for.
            assert (await client.post(path, content=body())).status_code == 401


@pytest.fixture
async def ingress(root: Path, temp: Path, system: LocalSystem, callers: Callers) -> Ingress:
    return ingress_of(root, system, keys_file=str(callers.file))


def ingress_of(root: Path, system: LocalSystem, **settings: Any) -> Ingress:
    given = AppSettings(root=str(root), **settings)
    publisher = make(root, root).publisher
    return Ingress(LocalHandle(WordRouter(DOMAINS)), LocalHandle(system.replica), LocalHandle(publisher), given)


async def code_of_call(ingress: Ingress, method: Any, context: Context) -> grpc.StatusCode | None:
    """What becomes of an empty request."""
    request = stream([]) if method.client_streaming else GetMessageClass(method.input_type)()
    answer = getattr(ingress, method.name)(request, context)
    try:
        if method.server_streaming:
            async for _ in answer:
                pass
        else:
            await answer
    except ZephyraError:
        pass
    return context.code


REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
SERVICE = pb.DESCRIPTOR.services_by_name["Zephyra"]


async def test_every_method_lets_in_whom_the_table_says(ingress: Ingress, callers: Callers) -> None:
    assert {method.name for method in SERVICE.methods} == METHODS.keys()
    assert CALL_ROLES == METHODS
    seen, expected = {}, {}
    for who, (rights, values) in callers.sent.items():
        for method in SERVICE.methods:
            context = Context(FOREIGN, [("x", "y"), *(("authorization", value) for value in values)])
            code = await code_of_call(ingress, method, context)
            seen[who, method.name] = code if code in REFUSED else "let in"
            allowed = METHODS[method.name] in MAY[rights]
            expected[who, method.name] = "let in" if allowed else REFUSED[rights != "nobody"]
            assert "zk-" not in context.details
            assert code is not grpc.StatusCode.INTERNAL, context.details
    assert seen == expected


async def test_a_key_is_revoked_while_the_system_runs(whole: System, tmp_path: Path) -> None:
    now_s, file = [0.0], tmp_path / "own.json"
    headers = {"authorization": f"Bearer {add_key(file, 'a', Role.INFER)}"}
    async with whole.client(access=Access(Keys(file, lambda: now_s[0]))) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        remove_key(file, "a")
        now_s[0] += CHECK_S
        assert (await client.get("/v1/models", headers=headers)).status_code == 401
        file.unlink()
        now_s[0] += CHECK_S
        unreadable = await client.get("/v1/models", headers=headers)
        assert (unreadable.status_code, error_of(unreadable)["code"]) == (503, "keys_unavailable")


@pytest.mark.parametrize(
    ("peer", "insecure", "allowed"),
    [
        ("ipv4:127.0.0.1:5000", False, {"infer", "admin"}),
        ("unix:", False, {"infer", "admin"}),
        (FOREIGN, False, set()),
        (FOREIGN, True, {"infer"}),
        ("ipv4:127.0.0.1:5000", True, {"infer", "admin"}),
    ],
)
async def test_without_keys_it_matters_where_a_grpc_caller_is(
    root: Path, temp: Path, system: LocalSystem, peer: str, insecure: bool, allowed: set[str]
) -> None:
    ingress = ingress_of(root, system, insecure=insecure)
    let_in = {
        method.name: await code_of_call(ingress, method, Context(peer)) not in REFUSED for method in SERVICE.methods
    }
    assert let_in == {name: role in allowed for name, role in METHODS.items()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"origin": "http://localhost:3000"}, 200),
        ({"x-forwarded-for": "127.0.0.1"}, 403),
        ({"x-forwarded-for": ""}, 403),
        ({"forwarded": "for=127.0.0.1"}, 403),
        ({"x-real-ip": "127.0.0.1"}, 403),
        ({"host": "evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
    ],
)
async def test_without_keys_headers_are_reason_to_refuse_and_never_to_believe(
    whole: System, headers: dict[str, str], status: int
) -> None:
    async with whole.client() as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == status
        assert (await client.get("/health", headers=headers)).status_code == 200
    async with whole.client(peer="10.0.0.7") as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == 403


async def test_behind_haproxy_nobody_is_taken_for_a_caller_of_this_machine(whole: System, callers: Callers) -> None:
    admin = callers.sent["admin"][1][0]
    for access, headers, status in (
        (Access(peers_known=False), {}, 403),
        (Access(insecure=True, peers_known=False), {}, 200),
        (Access(Keys(callers.file), peers_known=False), {"authorization": admin}, 200),
    ):
        async with whole.client(access=access) as client:
            assert (await client.get("/v1/models", headers=headers)).status_code == status
            change = await client.delete("/v1/domains/nowhere", headers=headers)
            assert change.status_code == (404 if headers else 403)
    with pytest.raises(PeerRefused, match="HAProxy"):
        Access(peers_known=False).check_call(Context(), Role.INFER)


def test_from_elsewhere_over_the_plain_port_not_even_a_key_helps(callers: Callers) -> None:
    """It has gone over the network for all to read."""
    access = Access(Keys(callers.file), plain_grpc_local=True)
    metadata = [("authorization", callers.sent["admin"][1][0])]
    tls = {"transport_security_type": [b"ssl"]}
    with pytest.raises(PeerRefused, match="use one with TLS"):
        access.check_call(Context(FOREIGN, metadata), Role.INFER)
    access.check_call(Context(FOREIGN, metadata, tls), Role.ADMIN)
    access.check_call(Context("ipv4:127.0.0.1:5000", metadata), Role.ADMIN)
    with pytest.raises(InvalidKey):
        access.check_call(Context(FOREIGN, [], tls), Role.INFER)
    with pytest.raises(PeerRefused):
        Access(plain_grpc_local=True).check_call(Context(FOREIGN, [], tls), Role.INFER)
