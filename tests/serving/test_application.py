"""How the application is built and configured, short of starting it."""

import os
import socket
from types import ModuleType

import pytest
import yaml
from ray._common.utils import import_attr
from ray.serve._private import constants
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from cluster.config.places import CHECKOUT
from cluster.config.serving import AppSettings, FetchSettings
from cluster.errors import CorruptArtifact, InvalidInput, NotTrained, PortTaken
from cluster.lora.catalog import Catalog, Change
from deployments import app
from deployments.api.grpc_service import add_service
from deployments.application import ONE_LOOP, PROXY, bind, build, check_packages
from deployments.cluster import Ports, serving
from tests.conftest import free_port


def deployments_of(application):
    return {deployment.name: deployment for deployment in build_app(application, name="zephyra").deployments}


def test_one_deployment_each_and_one_per_shard():
    names = list(deployments_of(bind(AppSettings(shards=3))))
    assert sorted(names) == sorted(
        [
            "Gateway",
            "Router",
            "BaseReplica",
            "Coordinator",
            "Publisher",
            "AdapterShard-0",
            "AdapterShard-1",
            "AdapterShard-2",
        ]
    )


@pytest.mark.parametrize("shards", [1, 2, 5, 40])
def test_two_cores_hold_any_number_of_shards(shards):
    deployments = deployments_of(bind(AppSettings(shards=shards)))
    assert sum(d.ray_actor_options["num_cpus"] for d in deployments.values()) <= 2


def test_settings_reach_the_deployments_they_are_for():
    settings = AppSettings(copies=3, hedge_ms=25, drain_s=7, affinity_slack=5)
    deployments = deployments_of(bind(settings))
    assert deployments["Coordinator"].user_config == {"copies": 3, "hedge_ms": 25}
    FetchSettings.model_validate(deployments["Coordinator"].user_config)
    replica = deployments["BaseReplica"]._deployment_config
    assert (replica.graceful_shutdown_timeout_s, replica.max_surge_percent) == (7, 100)
    assert replica.request_router_config.request_router_kwargs == {"slack": 5}
    on_gpus = deployments_of(bind(AppSettings(device="cuda", affinity_slack=None)))["BaseReplica"]._deployment_config
    assert on_gpus.max_surge_percent == 0
    assert on_gpus.request_router_config.is_default_request_router()


def test_what_every_token_passes_has_one_loop_by_switches_that_ray_knows():
    """An upgrade that drops one of them would cost a third of a fan-out and say nothing."""
    deployments = deployments_of(bind(AppSettings()))
    for name in ("Gateway", "BaseReplica", "Coordinator", "AdapterShard-0"):
        assert deployments[name].ray_actor_options["runtime_env"] == {"env_vars": ONE_LOOP}
    switches = {name: str(int(getattr(constants, name))) for name in ONE_LOOP}
    assert switches == dict.fromkeys(ONE_LOOP, "1")


def test_the_proxy_is_told_to_speak_grpc_by_switches_that_ray_knows(root, monkeypatch):
    """As above: half of what a token costs. An environment that says otherwise is left as it is."""
    for name in PROXY:
        monkeypatch.delenv(name, raising=False)
        assert hasattr(constants, name)
    monkeypatch.setenv("RAY_SERVE_PROXY_USE_GRPC", "0")
    build(AppSettings(root=str(root)))
    assert {name: os.environ[name] for name in PROXY} == {**PROXY, "RAY_SERVE_PROXY_USE_GRPC": "0"}


def test_serve_run_takes_the_builder_with_strings_for_arguments(root):
    """As the command line calls it."""
    arguments = {"root": str(root), "shards": "4"}
    for target in ("deployments:app", "deployments.app", "deployments"):
        application = call_user_app_builder_with_args_if_necessary(import_attr(target), arguments)
        assert "AdapterShard-3" in deployments_of(application)


def test_serve_run_refuses_an_argument_that_is_none():
    with pytest.raises(ValueError, match="shrads"):
        call_user_app_builder_with_args_if_necessary(app, {"shrads": "4"})


def test_serve_build_finds_an_application_without_a_trained_root():
    assert "Gateway" in deployments_of(import_attr("deployments:default_app"))


def test_a_root_without_a_base_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(NotTrained, match="zephyra train all"):
        build(AppSettings(root=str(tmp_path)))
    Catalog(tmp_path).publish(Change(base=1))
    with pytest.raises(CorruptArtifact, match="no base/1 in the root"):
        build(AppSettings(root=str(tmp_path)))
    with pytest.raises(NotTrained, match="nowhere"):
        build(AppSettings(base="artifacts/nowhere"))


def test_another_package_called_cluster_is_noticed():
    check_packages()
    other = ModuleType("cluster")
    other.__file__ = "/somewhere/cluster/__init__.py"
    with pytest.raises(InvalidInput, match="'cluster' in /somewhere/cluster is not Zephyra's"):
        check_packages(other)


def test_a_taken_port_is_named_before_ray_starts(root):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ports = Ports(http=free_port(), grpc=port, dashboard=None)
        with (
            pytest.raises(PortTaken, match=f"Port {port} is taken .* --grpc-port"),
            serving(AppSettings(root=str(root)), ports),
        ):
            pass


def test_the_config_file_holds_only_what_serve_knows():
    """Serve ignores keys it does not know; a misspelt one would do nothing without a word."""
    content = yaml.safe_load((CHECKOUT / "ray_config.yaml").read_text())
    assert "Serve config" in (CHECKOUT / "ray_config.yaml").read_text().splitlines()[0]
    schema = ServeDeploySchema.model_validate(content)
    understood = schema.model_dump(mode="json", exclude_unset=True)
    assert understood == content
    (application,) = schema.applications
    assert (application.name, schema.http_options.host) == ("zephyra", "127.0.0.1")
    AppSettings.model_validate(application.args)
    assert import_attr(application.import_path) is app
    (servicer,) = schema.grpc_options.grpc_servicer_functions
    assert import_attr(servicer) is add_service
