"""Domains as tables for the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.domains.info import DomainHistory, DomainInfo


def print_domains(infos: Sequence[DomainInfo], console: Console) -> None:
    """One row per domain, and below them what is wrong with any."""
    table = Table(box=None, header_style="bold")
    table.add_column("domain")
    for name in ("version", "rank", "size", "prototypes"):
        table.add_column(name, justify="right")
    for name in ("data-free", "tags", "aliases"):
        table.add_column(name)
    for info in infos:
        table.add_row(
            info.name,
            str(info.version),
            "?" if info.rank is None else str(info.rank),
            f"{info.num_bytes / 1e6:.1f} MB",
            str(info.num_prototypes) if info.num_prototypes else "by name only",
            "yes" if info.is_data_free else "",
            " ".join(f"{tag}={version}" for tag, version in info.tags.items()),
            " ".join(info.aliases),
        )
    console.print(table)
    for info in infos:
        if info.problem is not None:
            console.print(f"[red]{info.name}[/red]: {escape(info.problem)}", highlight=False)
    console.print(f"{len(infos)} domains", highlight=False)


def print_history(history: DomainHistory, console: Console) -> None:
    """The domain's row, its versions, its files."""
    print_domains([history.current], console)
    versions = ", ".join(str(version) for version in history.versions)
    console.print(f"versions written: {versions}", highlight=False)
    for file, num_bytes in history.files.items():
        console.print(f"  {escape(file)} ({num_bytes:,} bytes)", highlight=False)
