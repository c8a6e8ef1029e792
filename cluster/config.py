"""Every setting, with its default and unit: the only place that reads the environment.

Pydantic models with unknown keys refused, frozen, composed and never inherited from one another.
"""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

CHECKOUT = Path(__file__).resolve().parents[1]
"""The folder that holds `cluster/`: relative paths in settings are taken from here, in whatever process."""

DEFAULT_ROOT = "artifacts/starter"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(_Settings):
    """Limits of one base replica."""

    max_batch_size: int = Field(default=16, ge=1, le=1024)
    """Sequences decoded together."""
    max_waiting: int = Field(default=256, ge=1)
    """Sequences queued beyond that; one more is refused with Overloaded."""
    max_context_tokens: int | None = Field(default=None, ge=8)
    """Prompt and answer together; by default what the model was made for."""
    adapter_bytes: int = Field(default=2**30, ge=1)
    """Budget of the slot bank: adapters resident beside the base."""


class AppSettings(_Settings):
    """What `serve run deployments:app key=value ...` takes, and `args` in ray_config.yaml."""

    root: str | None = None
    """Folder of a trained system; by default artifacts/starter, or the root that `base` lies in."""
    base: str | None = None
    """Folder of another causal language model in Hugging Face's format; by default the root's own."""
    shards: int = Field(default=2, ge=1, le=1024)
    """Adapter shards."""
    replicas: int = Field(default=1, ge=1, le=1024)
    """Base replicas."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of a base replica's products; 0 for all cores of the machine."""
    engine: EngineSettings = EngineSettings()

    def resolved_root(self) -> Path:
        """The root as an absolute path. A base inside a root (`R/base/1`) stands for that root."""
        if self.root is not None:
            return absolute(self.root)
        if self.base is None:
            return absolute(DEFAULT_ROOT)
        base = absolute(self.base)
        for folder in (base, *list(base.parents)[:2]):
            if (folder / "catalog").is_dir():
                return folder
        return absolute("artifacts") / base.name

    def resolved_base(self) -> Path | None:
        """The folder of the base to serve, or None for the root's own."""
        if self.base is None or (absolute(self.base) / "catalog").is_dir():
            return None
        return absolute(self.base)


def absolute(path: str | Path) -> Path:
    """`path`, taken from the checkout when it is relative."""
    return (CHECKOUT / path).resolve()


def ray_address() -> str | None:
    """Where `ray job submit` said the cluster is; None outside a job."""
    return os.environ.get("RAY_ADDRESS")
