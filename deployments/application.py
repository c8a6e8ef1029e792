"""Binds the deployments to one another, in the order of the flow. They are plain classes, made deployments here."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.schema import LoggingConfig

import cluster
from cluster.config.places import CHECKOUT
from cluster.config.serving import AppSettings, FetchSettings
from cluster.environment import set_environment
from cluster.errors import InvalidInput
from cluster.lora.catalog import Catalog
from cluster.model.quantized_artifact import is_quantized
from cluster.model.servable import check_servable
from cluster.training.given_base import take_over_base
from deployments.api.ingress import Ingress
from deployments.api.keys import read_keys
from deployments.domains.publisher import Publisher
from deployments.replica.affinity_router import router_config
from deployments.replica.autoscaling import autoscaling_config
from deployments.replica.base_folder import base_folder
from deployments.replica.base_replica import BaseReplica
from deployments.router import Router
from deployments.shards.adapter_shard import AdapterShard
from deployments.shards.coordinator import Coordinator

logger = logging.getLogger(__name__)

APPLICATION_NAME = "zephyra"

_SHARDS_CPUS = 0.4
"""Of all shards together: they wait for disks and sockets, and a laptop's two cores must hold any number of them."""

ONE_LOOP = {
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""The environment of a replica whose code, calls and answers share an event loop: an ask and its answer then change
threads four times less. For code that never blocks its loop."""

MAX_GRPC_BYTES = 64 * 2**20
"""Of a message to Serve's proxy, decompressed, or from it; holds sixteen long answers with log-probabilities."""

PROXY = {
    # It would take messages of 2 GiB otherwise.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MAX_GRPC_BYTES),
    # It asks the Gateway over gRPC then and not by Ray's object store, which takes 1.6 times the CPU per token.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(MAX_GRPC_BYTES),
}
"""The environment of Serve's proxy and of the processes that answer it. They have it from Ray, if that is started after
an application was built."""


def build(settings: AppSettings) -> Application:
    """The application for these settings. Raises before anything starts: `NotTrained` when there is no such base,
    `InvalidInput` when it is one that cannot be served, or when the keys cannot be read.

    A base from elsewhere becomes the base of its root, if that has none yet: adapters for it can then be added.
    """
    check_packages()
    for name, value in PROXY.items():
        set_environment(name, value)
    if (keys_file := settings.resolved_keys_file()) is not None:
        read_keys(keys_file)
    folder = base_folder(settings)
    if settings.resolved_base() is not None:
        check_servable(folder, settings.engine.max_context_tokens)
        if Catalog(root := settings.resolved_root()).load().base is None and not is_quantized(folder):
            take_over_base(root, str(settings.base), logger.info, settings.engine.max_context_tokens)
    return bind(settings)


def bind(settings: AppSettings) -> Application:
    """The application, without a look at the root."""
    root = settings.resolved_root()
    router = _deployment(Router, "Router", num_cpus=0.1).bind(root)
    shards = [
        _deployment(
            AdapterShard, f"AdapterShard-{index}", num_cpus=_shard_cpus(settings.shards), env_vars=ONE_LOOP
        ).bind(root)
        for index in range(settings.shards)
    ]
    fetching = FetchSettings(copies=settings.copies, hedge_ms=settings.hedge_ms)
    coordinator = _deployment(
        Coordinator, "Coordinator", num_cpus=0.1, env_vars=ONE_LOOP, user_config=fetching.model_dump()
    ).bind(shards)
    replica = _deployment(
        BaseReplica,
        "BaseReplica",
        num_cpus=0.5,
        drain_s=settings.drain_s,
        num_gpus=int(settings.device == "cuda"),
        env_vars=ONE_LOOP,
        **_num_replicas(settings),
        **(
            {} if settings.affinity_slack is None else {"request_router_config": router_config(settings.affinity_slack)}
        ),
    ).bind(coordinator, settings)
    publisher = _deployment(Publisher, "Publisher", num_cpus=0.1, max_ongoing_requests=64).bind(settings)
    ingress = serve.ingress()(Ingress)
    gateway = _deployment(ingress, "Gateway", num_cpus=0.1, drain_s=settings.drain_s, env_vars=ONE_LOOP)
    return gateway.bind(router, replica, publisher, settings)


def check_packages(imported: ModuleType = cluster) -> None:
    """Raise `InvalidInput` if another package called `cluster`, such as PyPI's, was imported instead of ours."""
    if getattr(imported, "DISTRIBUTION", None) != "zephyra":
        place = Path(imported.__file__ or "?").parent
        raise InvalidInput(f"The package 'cluster' in {place} is not Zephyra's; run from {CHECKOUT}, or remove it.")


def _num_replicas(settings: AppSettings) -> dict[str, Any]:
    if settings.max_replicas is None:
        return {"num_replicas": settings.replicas}
    config = autoscaling_config(
        settings.replicas, settings.max_replicas, settings.upscale_delay_s, settings.downscale_delay_s
    )
    return {"autoscaling_config": config}


def _shard_cpus(num_shards: int) -> float:
    # Ray counts in steps of 1/10000.
    return max(round(_SHARDS_CPUS / max(num_shards, 4), 4), 0.0001)


def _deployment(
    cls: type,
    name: str,
    num_cpus: float,
    num_gpus: int = 0,
    drain_s: float = 5.0,
    env_vars: Mapping[str, str] | None = None,
    **options: Any,
) -> Deployment:
    """`cls` as a deployment. The engine and the queues in front of it limit what runs, so Serve admits plenty;
    a dead replica is noticed within a second instead of Serve's ten.
    """
    environment = {} if env_vars is None else {"runtime_env": {"env_vars": dict(env_vars)}}
    decorate = serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus, **environment},
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=drain_s,
        # A rolling restart starts the new one before it stops the old, but where that would take a second GPU.
        max_surge_percent=0 if num_gpus else 100,
        # One line per request, not one per hop.
        logging_config=LoggingConfig(enable_access_log=name == "Gateway"),
        **{"max_ongoing_requests": 1024, **options},
    )
    deployment: Deployment = decorate(cls)
    return deployment
