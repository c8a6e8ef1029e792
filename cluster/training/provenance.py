"""What an artifact was made of: kept inside it, so that anybody can make it again."""

import hashlib
import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import cluster
from cluster.config.training import StageSettings
from cluster.training.data import data_digest

FILE = "training.json"


def provenance(stage: str, settings: StageSettings) -> dict[str, Any]:
    """Seed, settings, digest of the data and of the code, and the libraries that computed."""
    return {
        "stage": stage,
        "recipe": settings.name,
        "settings": settings.recipe.model_dump(mode="json"),
        "seed": settings.recipe.seed,
        "data": data_digest(settings.data),
        "code": {"version": metadata.version("zephyra"), "sources": _sources()},
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def write_provenance(folder: Path, stage: str, settings: StageSettings) -> None:
    """Put it into an artifact that is being written."""
    (folder / FILE).write_text(json.dumps(provenance(stage, settings), indent=2))


@cache
def _sources() -> str:
    """SHA-256 of the package's own sources: a job runs in a copy of the code that no version control knows."""
    folder = Path(cluster.__file__).parent
    whole = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        whole.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()
