"""Clients that mean harm, over HTTP: refused in bounded time and memory, and the catalog is as it was.

What a form may hold is in `test_domains_api.py`, what an adapter may be in `test_handed_in.py`, what Ray's own proxies
let through in `test_hostile_cluster.py`.
"""

import asyncio
import gzip
import io
import json
import socket
import struct
import time
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from deployments.api import openai_api
from deployments.api.body_limit import BODY_S, MAX_BODY_BYTES, MAX_HEADERS, BodyLimit, Refusal
from deployments.replica.base_replica import BaseReplica
from tests.serving import virtual_time
from tests.serving.handed_in import form_of
from tests.serving.http_client import error_of
from tests.serving.local_server import listening, whole_system
from tests.serving.publishing import System

JSON = {"content-type": "application/json"}
HUNDRED_MB = 100 * 10**6
PIECE = bytes(2**16)
BODY_FIELDS = {"prompt": "hi", "model": "base", "max_tokens": 2}


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Python's own memory grows by less than that within."""
    tracemalloc.start()
    try:
        yield
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < num_bytes


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/route", "/v1/domains"])
@pytest.mark.parametrize("is_announced", [True, False])
async def test_of_a_hundred_megabytes_no_more_is_read_than_the_limit(
    publishing: System, domains_client: httpx.AsyncClient, path: str, is_announced: bool
) -> None:
    before, read_bytes = publishing.files(), 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read_bytes
        while read_bytes < HUNDRED_MB:
            read_bytes += len(PIECE)
            yield PIECE

    headers = {**JSON, **({"content-length": str(HUNDRED_MB)} if is_announced else {})}
    with at_most(4 * MAX_BODY_BYTES):
        response = await domains_client.post(path, content=body(), headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (413, "upload_too_large")
    assert read_bytes <= (0 if is_announced else MAX_BODY_BYTES + len(PIECE))
    assert publishing.files() == before


def test_a_body_that_comes_byte_by_byte_is_waited_for_so_long_and_no_longer() -> None:
    sent_bytes, waited_s = 0, 0.0

    async def drip() -> Message:
        nonlocal sent_bytes
        await asyncio.sleep(0.7)
        sent_bytes += 1
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass

    async def scenario() -> None:
        nonlocal waited_s
        limited = BodyLimit(read_all, upload_bytes=2**20, refusal=lambda error: PlainTextResponse(str(error)))
        scope: Scope = {"type": "http", "path": "/v1/completions", "headers": []}
        with pytest.raises(Refusal, match="longer than 60 s"):
            await limited(scope, drip, drip)
        waited_s = asyncio.get_running_loop().time()

    virtual_time.run(scenario())
    assert waited_s == pytest.approx(BODY_S)
    assert sent_bytes == BODY_S // 0.7


BOMBS = {
    "a zip of zeros": lambda: _zip_of_zeros(),
    "a gzip of zeros": lambda: gzip.compress(bytes(2**26)),
    "a header that promises a terabyte": lambda: _safetensors({"x": _tensor([2**20, 2**18], 2**40)}),
    "a header beyond the file": lambda: struct.pack("<Q", 2**40) + b"{}",
    "a deep header": lambda: _file_with(b'{"x":' * 100_000),
}


def _zip_of_zeros() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26))
    return file.getvalue()


def _tensor(shape: list[int], num_bytes: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, num_bytes]}


def _safetensors(header: dict[str, Any]) -> bytes:
    return _file_with(json.dumps(header).encode())


def _file_with(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.anyio
@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_bomb_is_refused_without_being_unpacked(
    publishing: System, domains_client: httpx.AsyncClient, adapter: Path, bomb: str
) -> None:
    before, content = publishing.files(), BOMBS[bomb]()
    assert len(content) < 2**20
    with at_most(2**24):
        form = {**form_of(adapter), "adapter_model": content}
        response = await domains_client.post("/v1/domains", files=form, data={"name": "tax"})
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_adapter")
    packed = await domains_client.post("/v1/completions", content=content, headers={**JSON, "content-encoding": "gzip"})
    assert (packed.status_code, error_of(packed)["type"]) == (400, "invalid_request_error")
    assert publishing.files() == before


@pytest.mark.anyio
@pytest.mark.parametrize(
    "name",
    ["..%2flaw", "..%2f..%2fcatalog", "%2e%2e", "law%2f1", "law%00", "%2fetc%2fpasswd", "law%0a", "l" * 5000, "..."],
)
async def test_no_path_leads_out_of_the_domains(
    publishing: System, domains_client: httpx.AsyncClient, name: str
) -> None:
    before = publishing.files()
    plain = httpx.URL(f"http://x/{name}").path[1:]
    for response in (
        await domains_client.get(f"/v1/domains/{name}"),
        await domains_client.delete(f"/v1/domains/{name}"),
        await domains_client.post(f"/v1/domains/{name}/rollback", json={"version": 1}),
        await domains_client.post("/v1/unload_lora_adapter", json={"lora_name": plain}),
    ):
        assert response.status_code in (400, 404, 405), response.text
        assert len(error_of(response)["message"]) <= 1000
    assert publishing.files() == before


def _limited(**limits: Any) -> Any:
    """The middleware with other limits, for clients whose time is real."""
    return lambda app, **given: BodyLimit(app, **{**given, **limits})


@pytest.fixture(scope="module")
def server(template: Path) -> Iterator[tuple[str, int, BaseReplica]]:
    """Read-only; it waits a third of a second for a body."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_api, "BodyLimit", _limited(body_s=0.3))
        with listening(partial(whole_system, template / "root")) as server:
            yield server


def test_thousands_of_headers_are_refused_and_the_next_request_is_answered(
    server: tuple[str, int, BaseReplica],
) -> None:
    host, port, _ = server
    for headers in (b"".join(b"x-%d: y\r\n" % index for index in range(10_000)), b"x: %s\r\n" % (b"y" * 10**6)):
        with socket.create_connection((host, port), timeout=60) as client:
            client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" + headers + b"\r\n")
            head, _, content = b"".join(iter(partial(client.recv, 2**16), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        error = json.loads(content)["error"]
        assert (error["code"], f"the most is {MAX_HEADERS}" in error["message"]) == ("invalid_input", True)
        assert httpx.get(f"http://{host}:{port}/v1/models", timeout=30).status_code == 200


def test_clients_that_send_a_body_slowly_are_let_go_while_others_are_answered(
    server: tuple[str, int, BaseReplica],
) -> None:
    host, port, _ = server
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1000\r\n\r\n".encode()
    slow = [socket.create_connection((host, port), timeout=30) for _ in range(20)]
    try:
        for one in slow:
            one.sendall(head + b" ")
        answer = httpx.post(f"http://{host}:{port}/v1/completions", json=BODY_FIELDS, timeout=30)
        assert answer.status_code == 200
        for one in slow:
            # Read to its end: the server has closed the connection.
            said = b"".join(iter(partial(one.recv, 2**16), b""))
            assert said.startswith(b"HTTP/1.1 504 ")
            assert b"connection: close" in said
            assert b"The body took longer than 0.3 s; send it faster." in said
    finally:
        for one in slow:
            one.close()


def test_an_answer_is_finished_whether_or_not_its_client_reads_it(server: tuple[str, int, BaseReplica]) -> None:
    host, port, replica = server
    body = json.dumps({"prompt": "hi", "model": "base", "max_tokens": 1500, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    with socket.socket() as client:
        # So small that the server cannot send it all.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect((host, port))
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        said = client.recv(100)
        end_s = time.monotonic() + 60
        while replica.engine.num_unanswered:
            assert time.monotonic() < end_s, "it waits for its reader"
            time.sleep(0.05)
        said += b"".join(iter(partial(client.recv, 2**16), b""))
    assert said.startswith(b"HTTP/1.1 200 ")
    assert b"data: [DONE]" in said
    assert b'"finish_reason":"length"' in said
