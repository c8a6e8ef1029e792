"""`zephyra keys ...`: who may call, and what they may do. A running system follows within a second."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.config.places import DEFAULT_KEYS_FILE, absolute
from deployments.commands.command_line import console, errors_told

app = typer.Typer(no_args_is_help=True, help="API keys: the hashes of those that are let in.")

_File = Annotated[
    Path | None, typer.Option("--file", help=f"Where they are kept; by default {DEFAULT_KEYS_FILE} in the checkout.")
]
_Name = Annotated[str, typer.Argument(help="Whose the key is, or what for.")]


@app.command()
def add(
    name: _Name,
    role: Annotated[str, typer.Option(help="infer, or admin: who may change domains as well.")] = "infer",
    file: _File = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from deployments.api.keys import add_key, role_of

    with errors_told():
        # Alone on its line and plain, so that a shell can take it.
        print(add_key(_place(file), name, role_of(role)))


@app.command("list")
def list_keys(file: _File = None) -> None:
    """Every key's name and role."""
    from deployments.api.keys import read_keys

    with errors_told():
        table = Table("name", "role", box=None)
        for entry in read_keys(_place(file)):
            table.add_row(entry.name, entry.role)
        console.print(table)


@app.command()
def remove(name: _Name, file: _File = None) -> None:
    """Revoke a key."""
    from deployments.api.keys import remove_key

    with errors_told():
        remove_key(_place(file), name)
        console.print(f"{name} is let in no more", highlight=False)


def _place(file: Path | None) -> Path:
    return absolute(DEFAULT_KEYS_FILE) if file is None else file.resolve()
