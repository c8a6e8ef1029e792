"""The manifests of k8s/: strictly of their kinds, and of one mind about every name and port that they share."""

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from lightkube.models.core_v1 import Container
from ray.serve.schema import ServeDeploySchema

from cluster.config.places import DEFAULT_KEYS_FILE
from cluster.config.serving import AppSettings
from cluster.config.training import Recipe, StageSettings
from cluster.training import DIVISIBLE, STAGES
from deployments.application import PROXY
from deployments.cluster import SERVICER
from deployments.train import parser
from tests.k8s.kinds import KINDS
from tests.k8s.strict import problems

CHECKOUT = Path(__file__).resolve().parents[2]
K8S = CHECKOUT / "k8s"
NAMESPACE = "zephyra"


def _documents(file: Path) -> list[Any]:
    return list(yaml.safe_load_all(file.read_text()))


@cache
def _all() -> dict[tuple[str, str], Any]:
    """Every object, by kind and name."""
    files = [*(K8S / "base").glob("*.yaml"), *(K8S / "jobs").glob("*.yaml")]
    every = [one for file in files if file.name != "kustomization.yaml" for one in _documents(file)]
    found = {(one["kind"], one["metadata"]["name"]): one for one in every}
    assert len(found) == len(every), "two objects of one kind and name"
    found["RayService", "gpu"] = _patched(
        found["RayService", "zephyra"], _documents(K8S / "overlays/gpu/workers.yaml")[0]
    )
    return found


def _patched(base: Any, operations: list[Any]) -> Any:
    """After the operations of RFC 6902 that the overlay has: replace, and add to the end of a list."""
    result = copy.deepcopy(base)
    for operation in operations:
        *way, last = operation["path"].split("/")[1:]
        place = result
        for key in way:
            place = place[key]
        if (operation["op"], last) == ("add", "-"):
            place.append(operation["value"])
        else:
            assert operation["op"] == "replace"
            assert last in place
            place[last] = operation["value"]
    return result


def _cluster(one: Any) -> Any:
    return one["spec"].get("rayClusterConfig") or one["spec"]["rayClusterSpec"]


def _pods() -> list[tuple[str, str, Any]]:
    """Of every pod template: its object's kind, its type of node, and itself."""
    pods = []
    for (kind, _), one in _all().items():
        if kind in ("RayService", "RayJob"):
            pods.append((kind, "head", _cluster(one)["headGroupSpec"]["template"]))
            pods += [(kind, "worker", group["template"]) for group in _cluster(one).get("workerGroupSpecs", [])]
    return pods


def _ports(pod: Any) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}


def _selected(labels: dict[str, str]) -> list[Any]:
    """Pods that have these labels, with those that KubeRay gives them."""
    return [
        pod
        for _, node, pod in _pods()
        if labels.items() <= {**pod["metadata"]["labels"], "ray.io/node-type": node}.items()
    ]


@pytest.mark.parametrize("key", list(_all()), ids="/".join)
def test_each_is_strictly_of_its_kind(key: tuple[str, str]) -> None:
    one = _all()[key]
    assert problems(one, KINDS[one["apiVersion"], one["kind"]], key[1]) == []
    assert one["metadata"]["namespace"] == NAMESPACE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"serveConfigv2": ""}, "no 'serveConfigv2' in RayServiceSpec"),
        ({"serveConfigV2": 3}, ".spec.serveConfigV2: 3 is no str"),
        ({"rayClusterConfig": {"rayVersion": "2"}}, "'headGroupSpec' is missing in RayClusterSpec"),
        ({"serveService": {"spec": {"ports": [{"name": "serve"}]}}}, "[0]: 'port' is missing in ServicePort"),
    ],
)
def test_what_is_wrong_is_seen(change: dict[str, Any], said: str) -> None:
    one = copy.deepcopy(_all()["RayService", "zephyra"])
    one["spec"].update(change)
    (found,) = problems(one, KINDS["ray.io/v1", "RayService"])[:1]
    assert said in found


def test_types_inside_a_pod_are_seen() -> None:
    container = {"name": "a", "ports": [{"containerPort": "8000"}], "securityContext": {"runAsNonroot": True}}
    assert problems(container, Container, "c") == [
        "c.ports[0].containerPort: '8000' is no int",
        "c.securityContext: there is no 'runAsNonroot' in SecurityContext",
    ]


@pytest.mark.parametrize(("name", "args"), [("zephyra", {}), ("gpu", {"device": "cuda"})])
def test_the_serve_config_is_ray_config_yaml_but_for_the_host_and_the_keys(name: str, args: dict[str, str]) -> None:
    config = yaml.safe_load(_all()["RayService", name]["spec"]["serveConfigV2"])
    expected = yaml.safe_load((CHECKOUT / "ray_config.yaml").read_text())
    expected["http_options"]["host"] = "0.0.0.0"
    expected["applications"][0]["args"].update({"keys_file": DEFAULT_KEYS_FILE, **args})
    assert config == expected
    ServeDeploySchema.model_validate(config)
    AppSettings.model_validate(config["applications"][0]["args"])
    assert config["grpc_options"]["grpc_servicer_functions"] == [SERVICER]


def test_ports_are_those_of_the_serve_config() -> None:
    service = _all()["RayService", "zephyra"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ports = {"serve": config["http_options"]["port"], "grpc": config["grpc_options"]["port"]}
    assert config["proxy_location"] == "HeadOnly"
    offered = service["spec"]["serveService"]["spec"]["ports"]
    assert {port["name"]: port["port"] for port in offered} == ports
    assert all(port["port"] == port["targetPort"] for port in offered)
    head = _ports(_cluster(service)["headGroupSpec"]["template"])
    assert head == {**ports, "metrics": 8080, "dashboard": 8265, "gcs-server": 6379}


def test_metrics_are_exported_where_they_are_scraped() -> None:
    for (kind, _), one in _all().items():
        if kind in ("RayService", "RayJob"):
            cluster = _cluster(one)
            for group in [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]:
                assert int(group["rayStartParams"]["metrics-export-port"]) == _ports(group["template"])["metrics"]
    workers = _all()["PodMonitor", "zephyra-workers"]["spec"]
    heads = _all()["ServiceMonitor", "zephyra-heads"]["spec"]
    assert [one["port"] for one in workers["podMetricsEndpoints"] + heads["endpoints"]] == ["metrics", "metrics"]
    assert _selected(workers["selector"]["matchLabels"]) == [pod for _, node, pod in _pods() if node == "worker"]


@pytest.mark.parametrize(("part", "kind"), [("serve", "RayService"), ("train", "RayJob")])
def test_a_policy_covers_its_pods_and_opens_ports_that_they_have(part: str, kind: str) -> None:
    policy = _all()["NetworkPolicy", f"zephyra-{part}"]["spec"]
    mine = policy["podSelector"]["matchLabels"]
    assert _selected(mine) == [pod for owner, _, pod in _pods() if owner == kind]
    within, *others = policy["ingress"]
    assert within == {"from": [{"podSelector": {"matchLabels": mine}}]}
    known = {port for pod in _selected(mine) for port in _ports(pod).values()}
    opened = {port["port"] for rule in others for port in rule["ports"]}
    assert opened == known - {6379}
    operator = next(rule for rule in others if "kuberay-operator" in str(rule))
    assert 8265 in {port["port"] for port in operator["ports"]}
    # Nobody but the operator reaches the dashboard, which runs what it is given.
    assert all(8265 not in {port["port"] for port in rule["ports"]} for rule in others if rule is not operator)


def test_the_budget_covers_the_serving_heads_alone() -> None:
    budget = _all()["PodDisruptionBudget", "zephyra-head"]["spec"]
    heads = [pod for kind, node, pod in _pods() if (kind, node) == ("RayService", "head")]
    assert _selected(budget["selector"]["matchLabels"]) == heads


def test_pods_run_as_the_images_user_and_mount_what_there_is() -> None:
    dockerfile = (K8S / "Dockerfile").read_text()
    workdir = re.findall(r"^WORKDIR (.+)$", dockerfile, re.MULTILINE)[-1]
    user = int(re.findall(r"^USER (\d+)$", dockerfile, re.MULTILINE)[-1])
    for kind, _, pod in _pods():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert (spec["securityContext"]["runAsNonRoot"], spec["securityContext"]["runAsUser"]) == (True, user)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert set(mounts) == set(volumes)
        assert mounts["root"] == f"{workdir}/artifacts"
        assert ("PersistentVolumeClaim", volumes["root"]["persistentVolumeClaim"]["claimName"]) in _all()
        assert ("keys" in mounts) == (kind == "RayService")
        assert mounts.get("keys") in (None, f"{workdir}/{DEFAULT_KEYS_FILE.removesuffix('/keys.json')}")
        secrets = [volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume]
        assert all(f"create secret generic {name} " in (K8S / "README.md").read_text() for name in secrets)
        assert container["image"].startswith("zephyra:0.1.0")
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == container["image"].endswith("-cuda")


def test_versions_are_those_of_this_checkout_and_ray_asks_for_a_token() -> None:
    for (kind, _), one in _all().items():
        if kind in ("RayService", "RayJob"):
            assert _cluster(one)["rayVersion"] == ray.__version__
            assert _cluster(one)["authOptions"] == {"mode": "token"}
    assert 'version = "0.1.0"' in (CHECKOUT / "pyproject.toml").read_text()


def test_the_image_has_the_environment_that_the_proxy_is_to_have() -> None:
    set_in_image = dict(re.findall(r"\b(RAY_SERVE_\w+)=(\S+)", (K8S / "Dockerfile").read_text()))
    assert set_in_image == PROXY


def test_there_is_one_job_for_each_stage_and_its_command_is_understood() -> None:
    jobs = {name: one for (kind, name), one in _all().items() if kind == "RayJob"}
    assert set(jobs) == {f"zephyra-train-{stage}" for stage in STAGES}
    for name, job in jobs.items():
        python, flag, module, *arguments = job["spec"]["entrypoint"].split()
        assert (python, flag, module) == ("python", "-m", "deployments.train")
        options = parser().parse_args(arguments)
        assert (f"zephyra-train-{options.stage}", options.run_name) == (name, name)
        StageSettings(root=options.root, data=options.data, recipe=Recipe(), name=options.recipe or "starter")
        (container,) = _cluster(job)["headGroupSpec"]["template"]["spec"]["containers"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert all(any(place.startswith(f"{mount}/") for mount in mounts) for place in (options.root, options.data))
        assert options.cpus < int(container["resources"]["limits"]["cpu"])
        groups = _cluster(job).get("workerGroupSpecs", [])
        # One worker for each pod, the head's included.
        assert options.workers == 1 + sum(group["replicas"] for group in groups)
        assert options.workers == 1 or options.stage in DIVISIBLE


def test_the_kustomizations_name_every_file() -> None:
    (base,) = _documents(K8S / "base/kustomization.yaml")
    assert {*base["resources"], "kustomization.yaml"} == {file.name for file in (K8S / "base").iterdir()}
    (overlay,) = _documents(K8S / "overlays/gpu/kustomization.yaml")
    assert (K8S / "overlays/gpu" / overlay["resources"][0]).resolve() == K8S / "base"
    (patch,) = overlay["patches"]
    assert (K8S / "overlays/gpu" / patch["path"]).is_file()
    assert (patch["target"]["kind"], patch["target"]["name"]) in _all()
