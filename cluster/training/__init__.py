"""The four training stages, one file each, each `stage(settings, run)`: stage_base, stage_adapters, stage_router,
stage_joint, in this order; stage_domain adds a domain to what they made. They read Parquet (`data`), publish artifacts
through the catalog, resume from their checkpoints, and print what they measured. `recipes` names their settings;
`evaluation` measures a whole system.
"""

from collections.abc import Callable

from cluster.config import StageSettings
from cluster.training.run import Run
from cluster.training.stage_adapters import train_adapters
from cluster.training.stage_base import train_base
from cluster.training.stage_domain import train_domain
from cluster.training.stage_joint import train_joint
from cluster.training.stage_router import train_router

STAGES: dict[str, Callable[[StageSettings, Run], None]] = {
    "base": train_base,
    "adapters": train_adapters,
    "router": train_router,
    "joint": train_joint,
}
"""The stages in their order."""

JOBS = {**STAGES, "domain": train_domain}
"""All that can be run as a job: beside the stages, a domain that is added to what they made."""
