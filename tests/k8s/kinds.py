"""The kinds that our manifests have. Those of Kubernetes are lightkube's (Apache-2.0); of the operators' only the
fields that we use or might, written from the API references of KubeRay v1.7 and the Prometheus operator (Apache-2.0).
"""

from typing import Any, Literal

from lightkube.models.core_v1 import PersistentVolumeClaim, PodTemplateSpec, Service
from lightkube.models.meta_v1 import LabelSelector, ObjectMeta
from lightkube.models.networking_v1 import NetworkPolicy
from lightkube.models.policy_v1 import PodDisruptionBudget


class AuthOptions:
    mode: Literal["token", "disabled"] | None
    secretName: str | None


class HeadGroup:
    rayStartParams: dict[str, str]
    template: PodTemplateSpec


class WorkerGroup:
    groupName: str
    replicas: int | None
    minReplicas: int
    maxReplicas: int
    rayStartParams: dict[str, str]
    template: PodTemplateSpec


class RayClusterSpec:
    rayVersion: str
    authOptions: AuthOptions | None
    enableInTreeAutoscaling: bool | None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] | None


class RayServiceSpec:
    serveConfigV2: str
    serveService: Service | None
    rayClusterConfig: RayClusterSpec


class RayJobSpec:
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] | None
    backoffLimit: int | None
    shutdownAfterJobFinishes: bool | None
    ttlSecondsAfterFinished: int | None
    rayClusterSpec: RayClusterSpec


class Endpoint:
    port: str
    interval: str | None
    path: str | None


class ServiceMonitorSpec:
    selector: LabelSelector
    endpoints: list[Endpoint]


class PodMonitorSpec:
    selector: LabelSelector
    podMetricsEndpoints: list[Endpoint]


def _custom(name: str, spec: type) -> type:
    hints = {"apiVersion": str, "kind": str, "metadata": ObjectMeta, "spec": spec}
    return type(name, (), {"__annotations__": hints})


KINDS: dict[tuple[str, str], Any] = {
    ("v1", "PersistentVolumeClaim"): PersistentVolumeClaim,
    ("networking.k8s.io/v1", "NetworkPolicy"): NetworkPolicy,
    ("policy/v1", "PodDisruptionBudget"): PodDisruptionBudget,
    ("ray.io/v1", "RayService"): _custom("RayService", RayServiceSpec),
    ("ray.io/v1", "RayJob"): _custom("RayJob", RayJobSpec),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _custom("ServiceMonitor", ServiceMonitorSpec),
    ("monitoring.coreos.com/v1", "PodMonitor"): _custom("PodMonitor", PodMonitorSpec),
}
