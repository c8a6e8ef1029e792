"""A second application beside the shared one, on a base of others, and changes to it while it runs: adapters that PEFT
made, copies in place, shards by a rolling restart under load; and base replicas by load itself.
"""

import asyncio
import json
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from ray.util import list_named_actors

from benchmarks.autoscale import Traffic
from cluster.lora.catalog import Catalog
from cluster.lora.placement import shard_of
from cluster.messages import AdapterRef
from cluster.training.given_base import take_over_base
from tests.model.foreign import CHATML, QUESTION, write_foreign
from tests.model.shapes import small_model
from tests.nano import CONTEXT_TOKENS
from tests.serving.handed_in import form_of, peft_folder
from tests.serving.test_any_base import TURN, answers

pytestmark = pytest.mark.ray

NAME = "second"
LAW = AdapterRef("law", 1)
SCALING = {"max_replicas": 2, "upscale_delay_s": 1, "downscale_delay_s": 2}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A base of others with room for long answers, a root that it is to become the base of, and how it is served."""
    model = small_model("smollm3", tied=False)
    model.config.max_position_embeddings = CONTEXT_TOKENS
    folder = tmp_path_factory.mktemp("given")
    # Of a small batch, so that a load is one wherever the requests wait: this base answers sooner than they arrive.
    settings = {"root": str(folder / "root"), "engine": {"max_batch_size": 4}}
    return {"base": str(write_foreign(folder / "mine", model, CHATML)), **settings}


def configure(given, shards, copies, **settings):
    """As `serve deploy` does with a file."""
    coordinator = {"name": "Coordinator", "user_config": {"copies": copies}}
    application = {
        "name": NAME,
        "route_prefix": f"/{NAME}",
        "import_path": "deployments:app",
        "args": {**given, "threads": 1, "shards": shards, **settings},
        "deployments": [coordinator],
    }
    _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))


def all_processes():
    """Names of the actors of each deployment; a new process has a new name."""
    found = defaultdict(list)
    for actor in list_named_actors(all_namespaces=True):
        kind, _, place = actor["name"].partition("::")
        if kind == "SERVE_REPLICA" and place.startswith(f"{NAME}#"):
            found[place.split("#")[1]].append(actor["name"])
    return found


def processes(deployment):
    return sorted(all_processes()[deployment])


def settled(num_shards, seconds=240):
    """Wait until the application runs as configured, and nothing of the old is left."""
    end_s = time.monotonic() + seconds
    while True:
        status = serve.status().applications.get(NAME)
        names = [f"AdapterShard-{index}" for index in range(num_shards)] + ["BaseReplica", "Gateway", "Coordinator"]
        if status and status.status == "RUNNING":
            running = all_processes()
            if all(len(running[name]) == 1 for name in names):
                return
        assert time.monotonic() < end_s, status
        # Looking takes the cores from processes that start.
        time.sleep(0.5)


@pytest.fixture(scope="module")
def second(served, given, adapter):
    configure(given, shards=2, copies=1)
    settled(num_shards=2)
    with httpx.Client(base_url=f"{served.http}/{NAME}", timeout=60) as client:
        add(client, LAW.domain, adapter)
        yield client
    serve.delete(NAME)


@pytest.fixture(scope="module")
def adapter(given, tmp_path_factory):
    """As PEFT saves one for this base, and far from doing nothing."""
    ours = tmp_path_factory.mktemp("adapter")
    take_over_base(ours / "root", given["base"], print)
    return peft_folder(ours / "root", ours / "peft")


def add(client, name, adapter):
    added = client.post("/v1/domains", data={"name": name}, files=form_of(adapter))
    assert added.status_code == 201, added.text


def ask(client):
    body = {"prompt": "hi", "mixture": {str(LAW): 1.0}, "max_tokens": 2}
    return client.post("/v1/completions", json=body)


def test_a_base_given_to_serve_takes_adapters_while_it_is_served(second, given, adapter):
    assert Catalog(given["root"]).load().base == 1
    plain, tuned = answers(given["base"], adapter, TURN, max_tokens=12)
    assert plain != tuned
    add(second, "tax", adapter)
    for model, expected in (("base", plain), ("zephyra:tax@1", tuned)):
        body = {"model": model, "max_tokens": 12, "messages": [{"role": "user", "content": QUESTION}]}
        answer = second.post("/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["message"]["content"] == expected


def test_copies_change_in_place_and_then_a_killed_shard_is_not_felt(second, given):
    before = processes("Coordinator"), processes("BaseReplica")
    configure(given, shards=2, copies=2)
    settled(num_shards=2)
    (name,) = processes(f"AdapterShard-{shard_of(LAW, 2)}")
    ray.kill(ray.get_actor(name, namespace="serve"))
    start_s = time.monotonic()
    response = ask(second)
    assert (response.status_code, time.monotonic() - start_s < 1.0) == (200, True)
    assert (processes("Coordinator"), processes("BaseReplica")) == before
    settled(num_shards=2)


def test_a_shard_more_breaks_no_stream_and_fails_no_request(second, given):
    before = processes("BaseReplica")
    changed, statuses, endings = Event(), [], []

    def keep_streaming():
        """One long answer after another: some begin in a process that is gone when the change is done."""
        body = {"prompt": "hi", "model": "base", "max_tokens": CONTEXT_TOKENS - 100, "ignore_eos": True, "stream": True}
        while not changed.is_set():
            with second.stream("POST", "/v1/completions", json=body) as response:
                *_, last, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
            endings.append((json.loads(last)["choices"][0]["finish_reason"], done))

    def keep_asking():
        while not changed.is_set():
            statuses.append(ask(second).status_code)
            # Processes that start need the cores as well.
            time.sleep(0.2)

    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(keep_streaming), pool.submit(keep_asking)]
        try:
            # More than is tested here: what is tested next need not restart everything again.
            configure(given, shards=3, copies=2, **SCALING)
            time.sleep(1)
            settled(num_shards=3)
        finally:
            changed.set()
        for load in loads:
            load.result()
    assert processes("BaseReplica") != before
    assert set(endings) == {("length", "[DONE]")}
    assert set(statuses) == {200}
    assert min(len(endings), len(statuses)) > 1


def num_running():
    """Base replicas, as `/api/serve/applications` shows them."""
    deployments = _get_global_client().get_serve_details()["applications"][NAME]["deployments"]
    return sum(replica["state"] == "RUNNING" for replica in deployments["BaseReplica"]["replicas"])


def test_a_base_replica_comes_with_the_load_and_goes_with_it_and_no_request_fails(second, given):
    configure(given, shards=3, copies=2, **SCALING)
    time.sleep(1)
    settled(num_shards=3)

    async def until(wanted, seconds=120):
        end_s = time.monotonic() + seconds
        while await asyncio.to_thread(num_running) != wanted:
            assert time.monotonic() < end_s, f"there were never {wanted}"
            await asyncio.sleep(0.5)

    async def up_and_down():
        heavy, light = Traffic(str(second.base_url)), Traffic(str(second.base_url))
        tasks = [asyncio.create_task(heavy.run(48)), asyncio.create_task(light.run(1))]
        try:
            await until(2)
            heavy.stop = True
            await until(1)
        finally:
            heavy.stop = light.stop = True
            await asyncio.gather(*tasks)
        return heavy, light

    assert num_running() == 1
    heavy, light = asyncio.run(up_and_down())
    assert (heavy.problems, light.problems) == ([], [])
    assert min(heavy.num_answered, light.num_answered) > 1
