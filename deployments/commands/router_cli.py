"""`zephyra router ...`: train, measure and question tiny ada alone."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.config.training import StageSettings
from deployments.commands.command_line import (
    STARTER,
    console,
    errors_told,
    root_and_data,
    root_of,
    run_stage,
    stage_settings,
)

app = typer.Typer(no_args_is_help=True, help="Tiny ada, the router, alone.")


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="starter, trial, open-domains, many-tasks or pretrained.")] = STARTER,
    data: Annotated[str | None, typer.Option(help="Folder of Parquet files; the starter makes its own.")] = None,
    root: Annotated[str | None, typer.Option(help="Where the adapters are; by default artifacts/RECIPE.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="A pretrained sentence encoder beside the n-grams: a folder, or a package that carries one."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Such an encoder to learn from only, which takes no time in routing: a folder, or a package."
        ),
    ] = None,
) -> None:
    """Train the router anew and publish it: stage 3 of `zephyra train`."""
    with errors_told():
        models = {"sentence_encoder": encoder, "teacher": teacher}
        run_stage("router", _with_models(stage_settings(recipe, data, root), models))


@app.command()
def evaluate(
    data: Annotated[str | None, typer.Option(help="Folder of Parquet files; by default what was trained on.")] = None,
    root: Annotated[str | None, typer.Option(help="The system; by default the one trained on --data last.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    rows: Annotated[int, typer.Option(min=1, help="At most so many rows of each domain.")] = 2_000,
    out: Annotated[
        str | None, typer.Option("--json", help="Where to write the report as JSON; by default not.")
    ] = None,
) -> None:
    """Right domains, prompts turned away, calibration, confusions, milliseconds per prompt."""
    from cluster.lora.catalog import Catalog
    from cluster.training.artifacts import published_router
    from cluster.training.data import read_data
    from cluster.training.router_evaluation import evaluate_router
    from cluster.training.stage_router import router_rows
    from deployments.commands.router_report import print_router_report

    with errors_told():
        place, folder = root_and_data(root, data)
        router = published_router(place, Catalog(place).load())
        report = evaluate_router(router, router_rows(read_data(folder), split, rows), split)
        print_router_report(report, console)
        if out is not None:
            _write_json(asdict(report), Path(out).resolve())


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="What to route.")],
    root: Annotated[str | None, typer.Option(help="The system; by default the starter.")] = None,
    against: Annotated[str, typer.Option(help="none, or another domain to compare the best one with.")] = "none",
    top: Annotated[int, typer.Option(min=1, help="So many words, letters and pairs.")] = 12,
    out: Annotated[str | None, typer.Option("--json", help="Where to write all of it as JSON; by default not.")] = None,
) -> None:
    """Why a prompt goes where it goes: probabilities, the nearest prototypes, the words that decided."""
    from cluster.lora.catalog import Catalog
    from cluster.router.explanation import explain as ask
    from cluster.training.artifacts import published_router
    from deployments.commands.router_report import print_explanation

    with errors_told():
        place = root_of(root)
        explanation = ask(published_router(place, Catalog(place).load()), prompt, against)
        print_explanation(explanation, console, top)
        if out is not None:
            _write_json(asdict(explanation), Path(out).resolve())


def _with_models(settings: StageSettings, models: Mapping[str, str | None]) -> StageSettings:
    """The settings with these pretrained encoders, each a package or a folder below where the command was given."""
    found = {
        what: name if not Path(name).is_dir() else str(Path(name).resolve()) for what, name in models.items() if name
    }
    router = settings.recipe.router.model_copy(update=found)
    return settings.model_copy(update={"recipe": settings.recipe.model_copy(update={"router": router})})


def _write_json(content: dict[str, object], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2))
    console.print(f"written to {file}")
