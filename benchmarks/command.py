"""What the commands of all benchmarks share: their arguments, how they end, how far they have come."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from cluster.errors import InvalidInput, ZephyraError

_WIDTH = 130


class Described(Protocol):
    """A scenario, in words."""

    @property
    def what(self) -> str:
        """What it measures."""


def scenario_parser(name: str, about: str | None, scenarios: Mapping[str, Described]) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.<name>`, with --only."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="scenarios:\n" + "\n".join(f"  {key:12} {scenario.what}" for key, scenario in scenarios.items()),
    )
    parser.add_argument("--only", nargs="+", choices=scenarios, metavar="NAME", help="scenarios to run")
    return parser


def terminal(stderr: bool = False) -> Console:
    """Standard output or standard error, wide enough for a table also where it is a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_WIDTH)


def check_options(options: argparse.Namespace, positive: tuple[str, ...], files: tuple[str, ...]) -> None:
    """Raise `InvalidInput` for a number below 1, or a file to be written whose folder is not there."""
    for name in positive:
        if (value := getattr(options, name)) is not None and value < 1:
            raise InvalidInput(f"--{name.replace('_', '-')} is {value}; expected at least 1.")
    for name in files:
        if (file := getattr(options, name)) is not None and not file.parent.is_dir():
            raise InvalidInput(f"--{name} is {file}, whose folder does not exist; make it first.")


@contextmanager
def ended_well(errors: Console) -> Iterator[None]:
    """An error of the user's making ends the command with a sentence and exit status 1."""
    try:
        yield
    except ZephyraError as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def quiet_progress(console: Console, *more: ProgressColumn) -> Progress:
    """A bar per scenario, with `more` behind it.

    Redrawn between steps only: a thread that draws ten times a second slows what is timed.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *more,
        console=console,
        auto_refresh=False,
    )
