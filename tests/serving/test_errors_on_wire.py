"""Every public error class, provoked for real over both wires: status, OpenAI's shape, gRPC's code, one sentence."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster import errors
from cluster.config.serving import AppSettings, EngineSettings
from cluster.engine.engine import Engine
from cluster.lora.catalog import Catalog
from cluster.messages import AdapterRef
from cluster.router.examples import MAX_EXAMPLE_CHARACTERS
from deployments.api.access import Access
from deployments.api.gateway import Gateway
from deployments.api.keys import Keys, Role, add_key
from deployments.api.status import NEVER_SENT, STATUS, code_of
from deployments.domains.publisher import Publisher
from deployments.domains.remote_domains import RemoteDomains
from deployments.domains.uploads import MAX_OPEN
from deployments.protos import zephyra_pb2 as pb
from deployments.replica.base_replica import BaseReplica
from deployments.replica.engine_loop import EngineLoop
from deployments.shards.coordinator import Coordinator
from tests.conftest import free_port
from tests.nano import CONTEXT_TOKENS, DOMAINS, nano_base
from tests.serving.handed_in import REFUSED, TAX, form_of, messages
from tests.serving.http_client import error_of
from tests.serving.local import GoneHandle, LocalHandle, LocalSystem, WordRouter, local_system
from tests.serving.publishing import UPLOAD_BYTES, make
from tests.serving.test_status import CLASSES
from tests.serving.wires import Wires, wires

pytestmark = pytest.mark.anyio

CLOSED_BUCKET = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "x", "AWS_ALLOW_HTTP": "true"}


@dataclass
class Place:
    """What a provocation may use and spoil."""

    root: Path
    adapter: Path
    temp: Path
    stack: AsyncExitStack

    async def gateway(self, gateway: Gateway, access: Access | None = None, api_key: str = "") -> Wires:
        """Clients of a gateway behind which no publisher is."""
        domains = RemoteDomains(GoneHandle(), AppSettings())
        return await self.stack.enter_async_context(wires(gateway, domains, access, api_key))

    async def locked(self, api_key: str = "", file: str = "keys.json") -> Wires:
        """Clients of a system that asks for keys."""
        return await self.gateway(
            Gateway(GoneHandle(), GoneHandle(), self.root), Access(Keys(self.temp / file)), api_key
        )

    def system(self) -> LocalSystem:
        """All that answers prompts."""
        system = local_system(self.root, DOMAINS)
        self.stack.callback(system.replica.engine.stop)
        return system

    async def answering(self) -> Wires:
        """Clients of all that answers prompts."""
        return await self.gateway(self.system().gateway)

    async def publishing(self, **settings: Any) -> tuple[Publisher, Wires]:
        """A publisher and its clients."""
        system = make(self.root, self.temp, **settings)
        return system.publisher, await self.stack.enter_async_context(wires(system.gateway, system.domains))


@dataclass
class Tries:
    """One request over each wire, and words of what is said of it."""

    http: Awaitable[httpx.Response]
    grpc: Callable[[], Awaitable[object]] | None
    """Sends when called. None where gRPC's messages cannot even say it."""
    said: str
    headers: Mapping[str, str] = field(default_factory=dict)


def prompts(wires: Wires, said: str, http: Mapping[str, Any], **fields: Any) -> Tries:
    """A prompt to be completed, with fields that differ."""
    return Tries(
        wires.http.post("/v1/completions", json={"prompt": "of law", "max_tokens": 2, **http}),
        lambda: wires.grpc.Complete(pb.GenerateRequest(**{"prompt": "of law", **fields})),
        said,
    )


def adds(place: Place, wires: Wires, said: str, examples: list[str] | None = None, **changed: bytes) -> Tries:
    """The adapter, uploaded with examples or with another content of one of its files."""
    form = {**form_of(place.adapter), **changed}
    fields = {"name": "tax", **({} if examples is None else {"examples": "\n".join(examples)})}
    sent = [*messages("tax", place.adapter, examples or ())]
    sent += [pb.AddDomainRequest(**{part: content}) for part, content in changed.items()]
    return Tries(
        wires.http.post("/v1/domains", files=form, data=fields), lambda: wires.grpc.AddDomain(iter(sent)), said
    )


async def invalid_input(place: Place) -> Tries:
    few = {"max_tokens": 0}
    return prompts(await place.answering(), "max_tokens is 0", few, sampling=pb.Sampling(**few))


async def invalid_mixture(place: Place) -> Tries:
    mixture = pb.Mixture(entries=[pb.MixtureEntry(domain="law", weight=-1)])
    return prompts(await place.answering(), "not negative", {"mixture": {"law": -1}}, mixture=mixture)


async def prompt_too_long(place: Place) -> Tries:
    long = "a b c d " * CONTEXT_TOKENS
    return prompts(await place.answering(), f"{CONTEXT_TOKENS}", {"prompt": long}, prompt=long)


async def unknown_model(place: Place) -> Tries:
    return replace(prompts(await place.answering(), "There is no model", {"model": "gpt-4"}), grpc=None)


async def unknown_domain(place: Place) -> Tries:
    return prompts(await place.answering(), "no domain 'art'", {"model": "zephyra:art"}, domain="art")


async def unknown_request(place: Place) -> Tries:
    wires, body = await place.answering(), {"request_id": "nobody", "domain": "law"}
    return Tries(
        wires.http.post("/v1/feedback", json=body), lambda: wires.grpc.Feedback(pb.FeedbackRequest(**body)), "'nobody'"
    )


async def deadline_exceeded(place: Place) -> Tries:
    short = {"timeout_s": 1e-6}
    return prompts(await place.answering(), "allow more", short, **short)


async def corrupt_artifact(place: Place) -> Tries:
    file = place.root / "adapters/law/1/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    return prompts(await place.answering(), "is not what was published", {"model": "zephyra:law"}, domain="law")


async def router_unavailable(place: Place) -> Tries:
    gateway = Gateway(GoneHandle(), LocalHandle(place.system().replica), place.root, router_wait_s=0.05)
    return prompts(await place.gateway(gateway), "The router did not answer", {})


async def adapter_unavailable(place: Place) -> Tries:
    coordinator = Coordinator([GoneHandle(), GoneHandle()], shard_wait_s=0.05)
    replica = BaseReplica(LocalHandle(coordinator), AppSettings(root=str(place.root), threads=1))
    place.stack.callback(replica.engine.stop)
    gateway = Gateway(LocalHandle(WordRouter(DOMAINS)), LocalHandle(replica), place.root)
    return prompts(await place.gateway(gateway), f"which should hold {AdapterRef('law', 1)}", {})


class BrokenEngine(Engine):
    """One whose steps fail, as a bug or a broken memory would have it."""

    def step(self) -> Any:
        raise RuntimeError("secret")


async def replica_lost(place: Place) -> Tries:
    system = place.system()
    system.replica.engine.stop()
    system.replica.engine = EngineLoop(BrokenEngine(nano_base(place.root), EngineSettings()), system.replica._fetch)
    return prompts(await place.gateway(system.gateway), "The engine of this replica has failed", {})


async def upload_too_large(place: Place) -> Tries:
    _, wires = await place.publishing()
    return adds(place, wires, f"larger than {UPLOAD_BYTES} bytes", zephyra=bytes(UPLOAD_BYTES))


async def invalid_adapter(place: Place) -> Tries:
    REFUSED["half a file"][0](place.adapter)
    return adds(place, (await place.publishing())[1], "header")


async def incompatible_adapter(place: Place) -> Tries:
    REFUSED["another base"][0](place.adapter)
    return adds(place, (await place.publishing())[1], "trained on base 0000000000000000")


async def invalid_data(place: Place) -> Tries:
    long = "x" * (MAX_EXAMPLE_CHARACTERS + 1)
    return adds(place, (await place.publishing())[1], f"at most {MAX_EXAMPLE_CHARACTERS}", [long])


async def stage_order(place: Place) -> Tries:
    """To teach a router that is not there."""
    return adds(place, (await place.publishing())[1], "holds no router yet", TAX)


async def catalog_conflict(place: Place) -> Tries:
    _, wires = await place.publishing()
    return Tries(
        wires.http.delete("/v1/domains/law", headers={"expected-generation": "1"}),
        lambda: wires.grpc.RemoveDomain(pb.RemoveDomainRequest(name="law", expected_generation=1)),
        "not 1",
    )


async def peer_refused(place: Place) -> Tries:
    _, wires = await place.publishing(domain_changes=False)
    return Tries(
        wires.http.delete("/v1/domains/law"),
        lambda: wires.grpc.RemoveDomain(pb.RemoveDomainRequest(name="law")),
        "not changed over the network here",
    )


async def invalid_key(place: Place) -> Tries:
    add_key(place.temp / "keys.json", "ours", Role.ADMIN)
    tries = prompts(await place.locked("zk-somebody"), "is not known", {})
    return replace(tries, headers={"www-authenticate": "Bearer"})


async def role_refused(place: Place) -> Tries:
    wires = await place.locked(add_key(place.temp / "keys.json", "ours", Role.INFER))
    return Tries(
        wires.http.delete("/v1/domains/law"),
        lambda: wires.grpc.RemoveDomain(pb.RemoveDomainRequest(name="law")),
        "has the role infer",
    )


async def keys_unavailable(place: Place) -> Tries:
    return prompts(await place.locked("zk-ours", "taken-away.json"), "The keys cannot be read", {})


async def overloaded(place: Place) -> Tries:
    publisher, wires = await place.publishing()
    for _ in range(MAX_OPEN):
        await publisher.open_upload()
    return replace(adds(place, wires, f"{MAX_OPEN} uploads are under way"), headers={"retry-after": "1"})


async def publisher_unavailable(place: Place) -> Tries:
    """It is replaced in the middle of an upload: the next piece finds nothing of those before it."""
    publisher, wires = await place.publishing()

    async def replace_publisher() -> None:
        async with asyncio.timeout(10):
            while not (uploads := list(place.temp.glob("zephyra-uploads-*/*"))):
                await asyncio.sleep(0.01)
        for upload in uploads:
            await publisher.discard(upload.name)

    form = httpx.Request("POST", "http://x", files=form_of(place.adapter), data={"name": "tax"})
    whole = form.read()

    async def body() -> AsyncIterator[bytes]:
        yield whole[:100]
        await replace_publisher()
        yield whole[100:]

    async def pieces() -> AsyncIterator[pb.AddDomainRequest]:
        first, *rest = messages("tax", place.adapter)
        yield first
        await replace_publisher()
        for piece in rest:
            yield piece

    headers = {"content-type": form.headers["content-type"]}
    return Tries(
        wires.http.post("/v1/domains", content=body(), headers=headers),
        lambda: wires.grpc.AddDomain(pieces()),
        "send it again",
    )


async def storage_unavailable(place: Place) -> Tries:
    """A bucket behind a port on which nobody listens; the Gateway's own root is another."""
    domains = RemoteDomains(LocalHandle(Publisher(AppSettings(root="s3://zephyra/gone"))), AppSettings())
    gateway = Gateway(GoneHandle(), GoneHandle(), place.root)
    wired = await place.stack.enter_async_context(wires(gateway, domains))
    return Tries(
        wired.http.get("/v1/domains"),
        lambda: wired.grpc.ListDomains(pb.ListDomainsRequest()),
        "The bucket s3://zephyra/gone could not be used",
    )


PROVOCATIONS: dict[type[errors.ZephyraError], Callable[[Place], Awaitable[Tries]]] = {
    errors.InvalidInput: invalid_input,
    errors.InvalidMixture: invalid_mixture,
    errors.PromptTooLong: prompt_too_long,
    errors.UploadTooLarge: upload_too_large,
    errors.UnknownModel: unknown_model,
    errors.UnknownDomain: unknown_domain,
    errors.UnknownRequest: unknown_request,
    errors.IncompatibleAdapter: incompatible_adapter,
    errors.CorruptArtifact: corrupt_artifact,
    errors.InvalidAdapter: invalid_adapter,
    errors.CatalogConflict: catalog_conflict,
    errors.InvalidData: invalid_data,
    errors.StageOrder: stage_order,
    errors.PeerRefused: peer_refused,
    errors.InvalidKey: invalid_key,
    errors.RoleRefused: role_refused,
    errors.KeysUnavailable: keys_unavailable,
    errors.Overloaded: overloaded,
    errors.DeadlineExceeded: deadline_exceeded,
    errors.RouterUnavailable: router_unavailable,
    errors.PublisherUnavailable: publisher_unavailable,
    errors.AdapterUnavailable: adapter_unavailable,
    errors.StorageUnavailable: storage_unavailable,
    errors.ReplicaLost: replica_lost,
}


def test_every_class_is_provoked_or_is_never_sent() -> None:
    assert set(PROVOCATIONS) == set(STATUS)
    assert set(PROVOCATIONS) | NEVER_SENT == set(CLASSES)


@pytest.mark.parametrize("cls", PROVOCATIONS, ids=lambda cls: cls.__name__)
async def test_it_is_told_as_the_table_says_over_both_wires_and_the_catalog_is_as_it_was(
    cls: type[errors.ZephyraError],
    root: Path,
    template: Path,
    tmp_path: Path,
    temp: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**CLOSED_BUCKET, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}.items():
        monkeypatch.setenv(name, value)
    own_root = shutil.copytree(root if cls is errors.StageOrder else template / "root", tmp_path / "root")
    adapter = shutil.copytree(template / "peft", tmp_path / "peft")
    before = Catalog(own_root).load()
    async with AsyncExitStack() as stack:
        tries = await PROVOCATIONS[cls](Place(own_root, adapter, temp, stack))
        response = await tries.http
        caught = None
        if tries.grpc is not None:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await tries.grpc()
            caught = raised.value
    status, error = STATUS[cls], error_of(response)
    assert (response.status_code, error["type"], error["code"]) == (status.http, status.openai_type, code_of(cls("")))
    assert error["param"] is None
    assert response.headers["content-type"] == "application/json"
    assert dict(response.headers) == {**response.headers, **tries.headers}
    sentences = [error["message"]]
    if caught is not None:
        assert caught.code() is status.grpc
        sentences.append(caught.details() or "")
    for sentence in sentences:
        assert tries.said in sentence
        assert sentence.endswith(".")
        for inside in ("\n", "Traceback", "secret", str(tmp_path)):
            assert inside not in sentence
    assert Catalog(own_root).load() == before
    assert not [file for file in temp.rglob("*") if file.is_file() and file.name != "keys.json"], (
        "nothing is left of an upload"
    )
