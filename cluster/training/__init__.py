"""The four training stages, one file each, each `stage(settings, run)`: stage_base, stage_adapters, stage_router,
stage_joint, in this order; stage_domain adds a domain to what they made. They read Parquet (`data`), publish artifacts
through the catalog, resume from their checkpoints, and print what they measured. `recipes` names their settings;
`evaluation` measures a whole system.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.config.training import StageSettings
    from cluster.training.run import Run

# Each is imported when it runs: who only asks for a stage's name must not wait for torch and transformers.


def _base(settings: "StageSettings", run: "Run") -> None:
    from cluster.training.stage_base import train_base

    train_base(settings, run)


def _adapters(settings: "StageSettings", run: "Run") -> None:
    from cluster.training.stage_adapters import train_adapters

    train_adapters(settings, run)


def _router(settings: "StageSettings", run: "Run") -> None:
    from cluster.training.stage_router import train_router

    train_router(settings, run)


def _joint(settings: "StageSettings", run: "Run") -> None:
    from cluster.training.stage_joint import train_joint

    train_joint(settings, run)


STAGES: dict[str, Callable[["StageSettings", "Run"], None]] = {
    "base": _base,
    "adapters": _adapters,
    "router": _router,
    "joint": _joint,
}
"""The stages in their order."""

DIVISIBLE = ("base", "adapters")
"""Stages that several workers can run together; the others fit what is whole, in seconds, on one."""

ON_DEVICE = ("base", "adapters", "joint", "domain")
"""Stages that compute where they are told; the router is so small that it is trained on a CPU."""


def _domain(settings: "StageSettings", run: "Run") -> None:
    from cluster.training.stage_domain import train_domain

    train_domain(settings, run)


JOBS = {**STAGES, "domain": _domain}
"""All that can be run as a job: beside the stages, a domain that is added to what they made."""
