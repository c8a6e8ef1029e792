"""All stages of a recipe, one after the other; what is done is remembered, so that a stopped run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.config.places import CHECKOUT
from cluster.config.training import StageSettings
from cluster.training import STAGES

_FILE = "training.json"


def run_all(settings: StageSettings, run_stage: Callable[[str], None], again: bool) -> bool:
    """Run the stages that are not done yet through `run_stage(name)`; all of them if `again`. False if none was left.

    Other data, another recipe or another base than last time starts over too.
    """
    path = settings.root / _FILE
    kept = {} if again else _kept(settings.root)
    asked = {"data": str(settings.data), "recipe": settings.name, "base": settings.base}
    same = all(kept.get(name) == value for name, value in asked.items())
    done: list[str] = kept["done"] if same else []
    left = [stage for stage in STAGES if stage not in done]
    settings.root.mkdir(parents=True, exist_ok=True)
    for stage in left:
        run_stage(stage)
        done.append(stage)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({**asked, "done": done}, indent=2))
        draft.replace(path)
    return bool(left)


def is_trained(root: Path) -> bool:
    """Whether all stages of some recipe are done in `root`."""
    return set(_kept(root).get("done", ())) == set(STAGES)


def data_of(root: Path) -> Path | None:
    """The data that `root` was trained on, None if it is not known."""
    kept = _kept(root)
    return Path(kept["data"]) if kept else None


def root_trained_on(data: Path) -> Path | None:
    """The root below `artifacts` that was trained on `data` last, None if there is none."""
    files = sorted((CHECKOUT / "artifacts").glob(f"*/{_FILE}"), key=lambda file: -file.stat().st_mtime)
    return next((file.parent for file in files if data_of(file.parent) == data), None)


def live_recipe(root: Path) -> str:
    """The recipe for a domain that is added to `root`: the one that its other domains were trained by.

    Where that is not known, the base is one that others trained.
    """
    return str(_kept(root).get("recipe", "pretrained"))


def _kept(root: Path) -> dict[str, Any]:
    """What is remembered of the training of `root`; empty if nothing is."""
    path = root / _FILE
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return kept
