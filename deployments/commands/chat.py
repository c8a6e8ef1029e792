"""A conversation on the terminal, over either wire, with the domains that answered."""

import json
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import httpx
from rich.console import Console

from cluster.errors import InvalidInput, ZephyraError
from deployments.protos import zephyra_pb2 as pb
from deployments.protos import zephyra_pb2_grpc

Turn = tuple[str, str]
"""Role and text."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer; the first one says who answers."""

    text: str
    mixture: Mapping[str, float] | None = None
    routing_ms: float = 0.0


class Client(Protocol):
    """One of the two wires."""

    def ask(self, turns: list[Turn]) -> Iterator[Piece]:
        """The answer as it is made. Raises `ZephyraError` with what the server says is wrong."""


class HttpClient:
    """Server-sent events from /v1/chat/completions."""

    def __init__(
        self, url: str, model: str, max_tokens: int, api_key: str | None = None, ca: Path | None = None
    ) -> None:
        self._url, self._model, self._max_tokens = url.rstrip("/"), model, max_tokens
        self._headers = authorization(api_key)
        self._verify = True if ca is None else trusting(ca)

    def ask(self, turns: list[Turn]) -> Iterator[Piece]:
        messages = [{"role": role, "content": text} for role, text in turns]
        body = {"model": self._model, "messages": messages, "max_tokens": self._max_tokens, "stream": True}
        try:
            with httpx.stream(
                "POST",
                f"{self._url}/v1/chat/completions",
                json=body,
                headers=self._headers,
                verify=self._verify,
                timeout=300,
            ) as response:
                if response.status_code != 200:
                    response.read()
                    raise ZephyraError(reason_of(response))
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _http_piece(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError as error:
            raise ZephyraError(f"Nothing answers at {self._url} ({error}); start it with `make serve`.") from None


class GrpcClient:
    """zephyra.v1.Zephyra/Generate."""

    def __init__(
        self, target: str, model: str, max_tokens: int, api_key: str | None = None, ca: Path | None = None
    ) -> None:
        self._target, self._model, self._max_tokens = target, model, max_tokens
        self._metadata = tuple(authorization(api_key).items())
        stub: Any = zephyra_pb2_grpc.ZephyraStub  # generated, untyped
        self._stub = stub(_channel(target, ca))

    def ask(self, turns: list[Turn]) -> Iterator[Piece]:
        messages = [pb.Message(role=f"ROLE_{role.upper()}", content=text) for role, text in turns]
        request = pb.GenerateRequest(chat=pb.Chat(messages=messages), sampling=pb.Sampling(max_tokens=self._max_tokens))
        if self._model == "base":
            request.base.SetInParent()
        elif self._model.startswith("zephyra:"):
            request.domain = self._model.removeprefix("zephyra:")
        elif self._model != "zephyra":
            raise InvalidInput(f"{self._model!r} is no model; expected zephyra, zephyra:DOMAIN or base.")
        try:
            for chunk in self._stub.Generate(request, metadata=self._metadata, timeout=300):
                entries = chunk.routing.mixture.entries
                mixture = {f"{e.domain}@{e.version}": e.weight for e in entries} if chunk.HasField("routing") else None
                yield Piece(chunk.text, mixture, chunk.routing.routing_ms)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise ZephyraError(f"Nothing answers at {self._target}; start it with `make serve`.") from None
            raise ZephyraError(str(error.details())) from None


def authorization(api_key: str | None) -> dict[str, str]:
    """What says who asks, as a header and as metadata. Raises `InvalidInput` for a key that no header can hold."""
    if api_key is None:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise InvalidInput(
            "The API key holds characters that no key has; copy it again, as `zephyra keys add` said it."
        )
    return {"authorization": f"Bearer {api_key}"}


def _channel(target: str, ca: Path | None) -> grpc.Channel:
    if not target.startswith("https://"):
        return grpc.insecure_channel(target)
    # httpx brings its authorities along, gRPC its own.
    trusted = None if ca is None else _content(ca)
    return grpc.secure_channel(target.removeprefix("https://"), grpc.ssl_channel_credentials(trusted))


def trusting(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cadata=_content(ca).decode())
    except (ValueError, ssl.SSLError) as error:
        raise InvalidInput(f"--ca {str(ca)!r} holds no certificate ({error}); expected a PEM file.") from error


def _content(ca: Path) -> bytes:
    try:
        return ca.read_bytes()
    except OSError as error:
        raise InvalidInput(f"--ca {str(ca)!r} cannot be read ({error.strerror}); expected a PEM file.") from error


def reason_of(response: httpx.Response) -> str:
    """What the server says is wrong."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answered with HTTP {response.status_code}; is that Zephyra?"


def _http_piece(event: dict[str, object]) -> Piece:
    match event:
        case {"error": {"message": str(message)}}:
            raise ZephyraError(message)
        case {"choices": [{"delta": {"content": str(text)}}], "zephyra": {"mixture": dict(mixture), "routing_ms": ms}}:
            return Piece(text, mixture, float(str(ms)))
        case {"zephyra": {"mixture": dict(mixture), "routing_ms": ms}}:
            return Piece("", mixture, float(str(ms)))
        case {"choices": [{"delta": {"content": str(text)}}]}:
            return Piece(text)
        case _:
            return Piece("")


def converse(client: Client, prompt: str | None, console: Console, remember: bool = False) -> None:
    """Ask `prompt` and print the answer; without one, ask for prompts until an empty one or the end of input.

    Each prompt stands alone unless `remember` sends the turns before it along.
    """
    if prompt is not None:
        _answer(client, [("user", prompt)], console)
        return
    console.print("Ask something; an empty line ends the conversation.")
    turns: list[Turn] = []
    while True:
        try:
            text = console.input("[bold]you>[/] ").strip()
        except EOFError:
            return
        if not text:
            return
        try:
            answer = _answer(client, [*turns, ("user", text)], console)
        except ZephyraError as error:
            console.print(f"[red]error:[/red] {error}", highlight=False)
        else:
            turns += [("user", text), ("assistant", answer)] if remember else []


def _answer(client: Client, turns: list[Turn], console: Console) -> str:
    answer, who = "", ""
    for piece in client.ask(turns):
        if piece.mixture is not None:
            named = ", ".join(f"{ref} {weight:.0%}" for ref, weight in piece.mixture.items()) or "the plain base"
            who = f"answered by {named}, routed in {piece.routing_ms:.1f} ms"
        answer += piece.text
        console.print(piece.text, end="", markup=False, highlight=False)
    console.print(f"\n[dim]{who}[/dim]", highlight=False)
    return answer
