"""TLS on both wires: Ray's own servers in this process with a real certificate, and gRPC's on the shared cluster."""

import asyncio
import os
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.serve._private.grpc_util import start_grpc_server
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import gRPCOptions
from ray.serve.grpc_util import RayServegRPCContext

from cluster.config.serving import AppSettings
from cluster.environment import GrpcTls, grpc_tls, told_of_tls
from cluster.errors import InvalidInput, ZephyraError
from deployments.api.access import Access
from deployments.api.ingress import Ingress
from deployments.api.keys import Keys, Role, add_key
from deployments.api.openai_api import build_api
from deployments.cluster import SERVICER, Ports, Tls
from deployments.commands.chat import Client, GrpcClient, HttpClient
from deployments.domains.remote_domains import RemoteDomains
from deployments.protos import zephyra_pb2 as pb
from deployments.protos.zephyra_pb2_grpc import ZephyraStub
from tests.conftest import Served, free_port
from tests.serving.certificates import write_certificate
from tests.serving.http_client import client_of
from tests.serving.local import GoneHandle, LocalHandle, LocalSystem

QUESTION, NUM_TOKENS = "hi", 8


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return Tls(*write_certificate(tmp_path / "tls"), free_port())


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


async def text_of(client: Client) -> str:
    """What a chat's client is told, from a thread of its own as it waits."""
    return await asyncio.to_thread(lambda: "".join(piece.text for piece in client.ask([("user", QUESTION)])))


async def expected_text(system: LocalSystem) -> str:
    body = {"model": "base", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": NUM_TOKENS}
    async with client_of(system.gateway) as client:
        text: str = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
    return text


@asynccontextmanager
async def served_over_http(app: Any, ports: Ports) -> AsyncIterator[None]:
    """By the function that Ray's proxy calls."""
    task, server = await start_asgi_http_server(app, ports.http_options(), event_loop=asyncio.get_running_loop())
    while not server.started:
        await asyncio.sleep(0.01)
    yield
    server.should_exit = True
    await task


@pytest.mark.anyio
async def test_http_over_tls_with_a_key(system: LocalSystem, tls: Tls, keys_file: Path) -> None:
    ports = Ports(http=free_port(), tls=tls)
    key = add_key(keys_file, "a", Role.INFER)
    api = build_api(system.gateway, RemoteDomains(GoneHandle(), AppSettings()), Access(Keys(keys_file)))
    url, base = f"https://127.0.0.1:{ports.http}", ("base", NUM_TOKENS)
    async with served_over_http(api, ports):
        assert await text_of(HttpClient(url, *base, key, tls.cert)) == await expected_text(system)
        for client, said in (
            (HttpClient(url, *base, None, tls.cert), "There is no API key"),
            (HttpClient(url, *base, key), "CERTIFICATE_VERIFY_FAILED"),
            (HttpClient(url.replace("https", "http"), *base, key), "Nothing answers"),
        ):
            with pytest.raises(ZephyraError, match=said):
                await text_of(client)


def handlers_of(ingress: Ingress, contexts: list[RayServegRPCContext]) -> Callable[..., Any]:
    """What Serve's proxy does with a call, for `Generate`; `contexts` get what the Gateway sees of each."""

    async def generate(request: pb.GenerateRequest, context: Any) -> AsyncIterator[bytes]:
        seen = pickle.loads(pickle.dumps(RayServegRPCContext(context)))
        contexts.append(seen)
        try:
            async for chunk in ingress.Generate(request, seen):
                yield chunk.SerializeToString()
        except ZephyraError:
            await context.abort(seen.code(), seen.details())

    return lambda service_method, streaming_type: generate


@pytest.mark.anyio
async def test_grpc_over_tls_with_a_key_beside_the_plain_port(
    root: Path, system: LocalSystem, tls: Tls, keys_file: Path
) -> None:
    ports = Ports(grpc=free_port(), tls=tls)
    key = add_key(keys_file, "a", Role.INFER)
    settings = AppSettings(root=str(root), keys_file=str(keys_file))
    ingress = Ingress(GoneHandle(), LocalHandle(system.replica), GoneHandle(), settings)
    contexts: list[RayServegRPCContext] = []
    with told_of_tls(ports.grpc_tls()):
        options = gRPCOptions(port=ports.grpc, grpc_servicer_functions=[SERVICER])
        _, server = await start_grpc_server(
            handlers_of(ingress, contexts), options, event_loop=asyncio.get_running_loop()
        )
    target, base = f"https://127.0.0.1:{tls.grpc_port}", ("base", NUM_TOKENS)
    try:
        assert await text_of(GrpcClient(target, *base, key, tls.cert)) == await expected_text(system)
        assert await text_of(GrpcClient(f"127.0.0.1:{ports.grpc}", *base, key)) == await expected_text(system)
        for client, said in (
            (GrpcClient(target, *base, None, tls.cert), "There is no API key"),
            (GrpcClient(target, *base, key), "Nothing answers"),
            (GrpcClient(f"127.0.0.1:{tls.grpc_port}", *base, key), "Nothing answers"),
        ):
            with pytest.raises(ZephyraError, match=said):
                await text_of(client)
    finally:
        await server.stop(None)
    over_tls, plain, _ = contexts
    assert over_tls.peer().startswith("ipv4:127.0.0.1:")
    assert over_tls.auth_context()["transport_security_type"] == [b"ssl"]
    assert plain.auth_context().get("transport_security_type") != [b"ssl"]


@pytest.mark.ray
def test_a_rays_cluster_opens_the_port_with_tls(served: Served) -> None:
    credentials = grpc.ssl_channel_credentials(served.grpc_tls.cert.read_bytes())
    request = pb.GenerateRequest(prompt="hi", base=pb.Base(), sampling=pb.Sampling(max_tokens=8))
    with (
        grpc.secure_channel(served.grpc_tls.address, credentials) as channel,
        grpc.insecure_channel(served.grpc) as plain,
    ):
        assert ZephyraStub(channel).Complete(request).choices == ZephyraStub(plain).Complete(request).choices


def test_the_environment_is_told_and_left_as_it_was(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    before, told = dict(os.environ), GrpcTls(tls.cert, tls.key, "127.0.0.1:1")
    assert grpc_tls() is None
    with told_of_tls(told):
        assert grpc_tls() == told
        with told_of_tls(None):
            assert grpc_tls() == told
    assert dict(os.environ) == before
    monkeypatch.setenv("ZEPHYRA_TLS_CERT", str(tls.cert))
    with pytest.raises(InvalidInput, match="ZEPHYRA_TLS_CERT is set and ZEPHYRA_TLS_KEY is not"):
        grpc_tls()
    monkeypatch.setenv("ZEPHYRA_TLS_KEY", str(tls.key))
    assert grpc_tls() == GrpcTls(tls.cert, tls.key, "[::]:9443")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_other_machines_are_let_in_with_keys_or_on_purpose(host: str, keys_file: Path) -> None:
    with pytest.raises(InvalidInput, match=f"--host {host} lets other machines in, and there are no keys"):
        Ports(host=host).check_open_to(AppSettings())
    with pytest.raises(InvalidInput, match="zephyra keys add"):
        Ports(host=host).check_open_to(AppSettings(keys_file=str(keys_file)))
    add_key(keys_file, "a", Role.INFER)
    for settings in (AppSettings(keys_file=str(keys_file)), AppSettings(insecure=True)):
        Ports(host=host).check_open_to(settings)
    Ports().check_open_to(AppSettings())


def test_a_host_that_is_elsewhere_is_no_taken_port() -> None:
    with pytest.raises(InvalidInput, match=r"--host 203\.0\.113\.7 is no address of this machine"):
        Ports(host="203.0.113.7").check_free()


def test_a_certificate_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path / "a")
    _, other_key = write_certificate(tmp_path / "b")
    _, locked_key = write_certificate(tmp_path / "c", password="secret")
    Ports(tls=Tls(cert, key)).check_open_to(AppSettings())
    for pair in ((cert, other_key), (cert, locked_key), (key, cert), (cert, tmp_path / "nowhere")):
        with pytest.raises(InvalidInput, match="cannot be used for TLS"):
            Ports(tls=Tls(*pair)).check_open_to(AppSettings())
