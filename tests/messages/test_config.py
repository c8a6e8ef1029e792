"""Settings: unknown keys and relative paths are refused, defaults are valid, and a folder stands for its root."""

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import cluster.config
from cluster.config.places import CHECKOUT
from cluster.config.serving import AppSettings
from cluster.config.settings import Settings
from cluster.config.training import LiveDomainSettings, Recipe, StageSettings

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.iter_modules(cluster.config.__path__, f"{cluster.config.__name__}.")
]
SETTINGS = [
    item
    for module in MODULES
    for _, item in inspect.getmembers(module, inspect.isclass)
    if issubclass(item, BaseModel) and item.__module__ == module.__name__ and item is not Settings
]

REQUIRED: dict[type[BaseModel], dict[str, Any]] = {
    StageSettings: {"root": "/a", "data": "/b", "recipe": Recipe(), "name": "x"},
    LiveDomainSettings: {"domain": "tax"},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_refuse_unknown_keys_do_not_change_and_survive_json(kind: type[BaseModel]) -> None:
    given = REQUIRED.get(kind, {})
    made = kind(**given)
    with pytest.raises(ValidationError, match="no_such_setting"):
        kind(**given, no_such_setting=1)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, next(iter(kind.model_fields)), None)
    assert kind.model_validate_json(made.model_dump_json()) == made


def test_relative_paths_of_a_stage_are_refused() -> None:
    for paths in ({"root": "a", "data": "/b"}, {"root": "/a", "data": "./b"}):
        with pytest.raises(ValidationError, match="is relative; give an absolute path"):
            StageSettings(**paths, recipe=Recipe(), name="x")


def test_a_base_to_take_over_is_an_absolute_folder_or_an_id() -> None:
    for base in ("/models/a", "Qwen/Qwen3-0.6B"):
        assert StageSettings(root="/a", data="/b", recipe=Recipe(), name="x", base=base).base == base
    for base in ("./models/a", "a", "artifacts/a"):
        with pytest.raises(ValidationError, match="neither an absolute folder nor an id such as org/name"):
            StageSettings(root="/a", data="/b", recipe=Recipe(), name="x", base=base)


def test_what_is_served_is_found_from_root_or_base(tmp_path: Path) -> None:
    root, plain = tmp_path / "root", tmp_path / "some-model"
    (root / "catalog").mkdir(parents=True)
    (root / "base" / "1").mkdir(parents=True)
    plain.mkdir()
    assert AppSettings().resolved_root() == CHECKOUT / "artifacts/starter"
    assert AppSettings(root="x/y").resolved_root() == CHECKOUT / "x/y"
    for base in (root, root / "base", root / "base" / "1"):
        assert AppSettings(base=str(base)).resolved_root() == root
    assert AppSettings(base=str(root)).resolved_base() is None
    assert AppSettings(base=str(root / "base" / "1")).resolved_base() == root / "base" / "1"
    assert AppSettings(base=str(plain)).resolved_root() == CHECKOUT / "artifacts" / "some-model"
    assert AppSettings(base=str(plain), root=str(root)).resolved_root() == root
