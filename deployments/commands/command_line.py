"""What the commands of `zephyra` share: the terminal, how errors are told, and which folders a command means."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from pydantic import ValidationError
from rich.console import Console

from cluster.config.places import DEFAULT_ROOT, Root, absolute, is_hub_id
from cluster.config.serving import AppSettings
from cluster.config.settings import Device
from cluster.config.training import StageSettings
from cluster.errors import InvalidInput, StageOrder, ZephyraError

console = Console()

STARTER, STARTER_DATA = "starter", "artifacts/starter-data"
PRETRAINED = "pretrained"


@contextmanager
def errors_told() -> Iterator[None]:
    """Errors of the user's making: their sentence and exit status 1, no traceback."""
    try:
        yield
    except ZephyraError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def settings_of_options(**options: object) -> AppSettings:
    """What is served, from the options of a command. Raises `InvalidInput` for options that exclude one another."""
    try:
        return AppSettings.model_validate(options)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise InvalidInput(f"{problem}.") from None


def root_of(root: str | None) -> Path:
    """The folder that `--root` names; by default the starter's."""
    return Path(root).resolve() if root else absolute(DEFAULT_ROOT)


def root_or_bucket(root: str | None) -> Root:
    """What `--root` names where a bucket will do."""
    return root if root is not None and "://" in root else root_of(root)


def root_and_data(root: str | None, data: str | None) -> tuple[Path, Path]:
    """The system to measure and the data to measure it on; either is found by the other when only one is named."""
    from cluster.training.hub_data import find_data
    from cluster.training.pipeline import data_of, root_trained_on

    place = root_of(root)
    if data is not None and root is None:
        place = root_trained_on(find_data(data)) or place
    folder = find_data(data) if data is not None else data_of(place)
    if folder is None:
        raise StageOrder(f"{place} holds no trained system; run `zephyra train all` first, or name another --root.")
    return place, folder


def stage_settings(
    recipe_name: str | None, data: str | None, root: str | None, base: str | None = None
) -> StageSettings:
    """What a stage is run with, from the options of a command. Makes the starter's data if they are not there.

    With a base to take over, the recipe is the one for such and the root is named after it, unless these are given.
    """
    from cluster.training.hub_data import find_data
    from cluster.training.recipes import recipe

    recipe_name = recipe_name or (STARTER if base is None else PRETRAINED)
    chosen = recipe(recipe_name)
    if data is None and recipe_name not in (STARTER, PRETRAINED):
        raise InvalidInput(f"Recipe {recipe_name!r} needs --data: a folder of Parquet files.")
    folder = absolute(STARTER_DATA) if data is None else find_data(data)
    if data is None and not folder.is_dir():
        from cluster.training.starter.generate import generate_starter

        generate_starter(folder)
    named = base if base is None or (is_hub_id(base) and not Path(base).is_dir()) else str(Path(base).resolve())
    own = f"artifacts/{recipe_name}" if named is None else AppSettings(base=named).resolved_root()
    place = absolute(own) if root is None else Path(root).resolve()
    return StageSettings(root=place, data=folder, recipe=chosen, name=recipe_name, base=named)


def run_stage(stage: str, settings: StageSettings, device: Device = "cpu") -> None:
    """One stage in this process, with a progress bar."""
    from cluster.training import JOBS
    from cluster.training.compute import device_of
    from cluster.training.disk import full_disk_told
    from cluster.training.run import LocalRun
    from cluster.training.tracking import FOLDER

    name = f"{stage}-{settings.mark}"
    folder, events = settings.root / "runs" / name, settings.root / FOLDER / name
    with (
        LocalRun(stage, folder, console, events, device_of(device)) as run,
        full_disk_told(settings.root, run),
    ):
        JOBS[stage](settings, run)
