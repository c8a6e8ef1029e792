"""`zephyra domains ...`: what a root holds, and adding, withdrawing, rolling back and naming while it is served."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.config.settings import Device
from cluster.errors import InvalidInput
from cluster.router.examples import MAX_EXAMPLES_BYTES, Examples
from deployments.commands.command_line import (
    console,
    errors_told,
    root_and_data,
    root_of,
    root_or_bucket,
    run_stage,
)

if TYPE_CHECKING:
    from deployments.domains.operations import Domains

app = typer.Typer(no_args_is_help=True, help="The domains of a system, served or not.")

_Root = Annotated[
    str | None, typer.Option(help="Folder or bucket (s3://, gs://, az://) of the system; by default the starter.")
]
_Name = Annotated[str, typer.Argument(help="Of the domain.")]
_Expected = Annotated[
    int | None, typer.Option("--expected-generation", help="Do nothing if the catalog has moved on from this.")
]


@app.command("list")
def list_domains(root: _Root = None) -> None:
    """Every domain: version, rank, size, what the router knows of it, tags."""
    from deployments.commands.domains_report import print_domains

    with errors_told():
        print_domains(_domains(root).all(), console)


@app.command()
def show(name: _Name, root: _Root = None) -> None:
    """One domain with all its versions and the files of the current one."""
    from deployments.commands.domains_report import print_history

    with errors_told():
        print_history(_domains(root).show(name), console)


@app.command()
def add(
    name: _Name,
    adapter: Annotated[Path, typer.Option(help="Folder that PEFT saved: safetensors only.")],
    examples: Annotated[
        Path | None,
        typer.Option(help="Prompts of the domain: .txt, one per line, or .jsonl, {'prompt': ..., 'topic': ...} each."),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="No examples: let words of the adapter stand for them, a guess.")
    ] = False,
    root: _Root = None,
    expected_generation: _Expected = None,
) -> None:
    """Check an adapter, publish it, and teach the router its examples. A running system serves it within a second."""
    with errors_told():
        given = _examples(examples) if examples is not None else ()
        change = _domains(root).add(name, adapter, given, data_free, expected_generation)
        known = f"routed by {len(given)} examples" if given else "routed by a guess" if data_free else "by name only"
        console.print(f"published {change.ref}: {known}, in generation {change.generation}", highlight=False)


@app.command()
def train(
    name: _Name,
    data: Annotated[
        str,
        typer.Option(help="Parquet: a file, or a folder of them, with prompt and response; split if there are some."),
    ],
    root: Annotated[str | None, typer.Option(help="Folder of the system; by default the starter.")] = None,
    recipe: Annotated[str | None, typer.Option(help="By default the one that the system was trained by.")] = None,
    least_recall: Annotated[
        float, typer.Option(min=0, max=1, help="Share of its held-out prompts that must be routed to it.")
    ] = 0.5,
    epsilon: Annotated[
        float, typer.Option(min=0, max=1, help="The most that any other domain's share of such prompts may fall.")
    ] = 0.05,
    hold_out: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of the rows to measure on, where no split says which.")
    ] = 0.1,
    device: Annotated[Device, typer.Option(help="Where it is trained: cpu or cuda.")] = "cpu",
) -> None:
    """Train a domain from raw data while the system serves; published only if what is held out speaks for it."""
    from cluster.config.training import LiveDomainSettings, StageSettings
    from cluster.training.hub_data import find_data
    from cluster.training.pipeline import data_of, live_recipe
    from cluster.training.recipes import recipe as recipe_named

    with errors_told():
        place = root_of(root)
        chosen = recipe or live_recipe(place)
        live = LiveDomainSettings(
            domain=name, others=data_of(place), least_recall=least_recall, epsilon=epsilon, held_out_share=hold_out
        )
        settings = StageSettings(root=place, data=find_data(data), recipe=recipe_named(chosen), name=chosen, live=live)
        run_stage("domain", settings, device)


@app.command()
def remove(name: _Name, root: _Root = None, expected_generation: _Expected = None) -> None:
    """Withdraw a domain. Its files stay: `rollback NAME --to VERSION` brings it back."""
    with errors_told():
        change = _domains(root).remove(name, expected_generation)
        console.print(f"withdrew {name}, in generation {change.generation}", highlight=False)


@app.command()
def rollback(
    name: _Name,
    to: Annotated[int | None, typer.Option(min=1, help="Version; by default the one before the current.")] = None,
    root: _Root = None,
    expected_generation: _Expected = None,
) -> None:
    """Make an earlier version of a domain current again."""
    with errors_told():
        console.print(f"current is {_domains(root).rollback(name, to, expected_generation).ref}", highlight=False)


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="The other name.")],
    domain: Annotated[str | None, typer.Argument(help="What it names; without it, the alias is taken away.")] = None,
    root: _Root = None,
) -> None:
    """Give a domain another name, or take it away."""
    with errors_told():
        _domains(root).set_alias(name, domain)
        console.print(f"{name} names {domain}" if domain else f"{name} names nothing any more", highlight=False)


@app.command()
def tag(
    name: _Name,
    tag: Annotated[str, typer.Argument(help="Such as stable: then NAME@stable is a version like any other.")],
    version: Annotated[int | None, typer.Argument(min=1, help="Without it, the tag is taken away.")] = None,
    root: _Root = None,
) -> None:
    """Name a version of a domain, or take the name away."""
    with errors_told():
        _domains(root).set_tag(name, tag, version)
        meaning = f"is {name}@{version}" if version is not None else "means nothing any more"
        console.print(f"{name}@{tag} {meaning}", highlight=False)


@app.command()
def prune(
    root: Annotated[str | None, typer.Option(help="The system; by default the one trained on --data last.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of Parquet files; by default what was trained on.")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Stop at so many adapters.")] = 1,
    epsilon: Annotated[
        float, typer.Option(min=0, max=1, help="The most that any domain's loss may rise, as a share of it.")
    ] = 0.02,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each domain to measure.")] = 32,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    apply: Annotated[bool, typer.Option("--apply", help="Publish what is proposed, in one generation.")] = False,
) -> None:
    """Propose adapters to drop or to combine, with what each costs; nothing changes without --apply."""
    from cluster.training import pruning, pruning_report
    from cluster.training.run import LocalRun
    from deployments.commands.pruning_table import print_pruning

    with errors_told():
        place, folder = root_and_data(root, data)
        settings = pruning.PruneSettings(place, folder, keep, epsilon, split, rows)
        with LocalRun("pruning", place / "runs" / "pruning", console) as run:
            proposal = pruning.prune(settings, run)
        written = pruning_report.write_proposal(place, proposal.report)
        print_pruning(proposal.report, console)
        console.print(f"written to {written}: report.html to look at, report.json", highlight=False)
        if apply:
            state = pruning_report.apply(place, proposal)
            console.print(f"published in generation {state.generation}", highlight=False)
        else:
            console.print("nothing was changed; --apply does it", highlight=False)


def _domains(root: str | None) -> "Domains":
    # Here, so that --help does not wait for torch.
    from cluster.lora.artifacts import Store
    from deployments.domains.operations import Domains

    place = root_or_bucket(root)
    if isinstance(place, Path) and not place.is_dir():
        raise InvalidInput(f"There is no folder {str(place)!r}; name the root of a system with --root.")
    return Domains(Store(place))


def _examples(file: Path) -> Examples:
    if not file.is_file() or file.stat().st_size > MAX_EXAMPLES_BYTES:
        raise InvalidInput(f"{str(file)!r} is no file of at most {MAX_EXAMPLES_BYTES} bytes; name one with examples.")
    return Examples.from_bytes(file.read_bytes(), is_json=file.suffix == ".jsonl")
