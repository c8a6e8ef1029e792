"""A proposed pruning as tables on the terminal."""

from statistics import fmean

from rich.console import Console
from rich.table import Table

from cluster.training.pruning import PruneReport

_MOST_ROWS = 40


def print_pruning(report: PruneReport, console: Console) -> None:
    """What was tried, and what it comes to."""
    tried = Table(title="what was tried, the cheapest first", title_justify="left")
    tried.add_column("domain", no_wrap=True)
    tried.add_column("what", no_wrap=True)
    for name in ("mass", "lost without", "cost"):
        tried.add_column(name, justify="right")
    tried.add_column("worst domain", no_wrap=True)
    tried.add_column("its change", justify="right")
    tried.add_column("")
    for step in report.steps[:_MOST_ROWS]:
        use = report.uses.get(step.domain)
        tried.add_row(
            step.domain,
            "drop" if step.into is None else f"combine with {step.into}",
            "" if use is None else f"{use.mass:.4f}",
            "" if use is None else f"{use.ablation_regret:.4f}",
            f"{step.cost:+.3%}",
            step.worst_domain,
            f"{step.worst_change:+.2%}",
            "[green]done[/]" if step.accepted else "[red]taken back[/]",
        )
    console.print(tried)
    if len(report.steps) > _MOST_ROWS:
        console.print(f"and {len(report.steps) - _MOST_ROWS} more, in the report")
    changes = report.changes()
    worst = max(changes, key=changes.__getitem__)
    console.print(
        f"{report.num_kept} of {report.num_adapters} adapters stay; loss per domain {fmean(changes.values()):+.2%} on "
        f"average, {changes[worst]:+.2%} in the worst ({worst})",
        highlight=False,
    )
