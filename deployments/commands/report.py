"""The evaluation's report as tables on the terminal."""

from statistics import mean

from rich.console import Console
from rich.table import Table

from cluster.training.evaluation import DomainReport, Report
from cluster.training.evaluation_history import Change
from deployments.commands.router_report import print_router_report


def print_report(report: Report, console: Console) -> None:
    """Losses and routing, exact answers where they were checked, and the means."""
    console.print(_losses(report))
    _summarize_losses(list(report.domains.values()), console)
    _summarize_regret(list(report.domains.values()), console)
    if any(domain.exact_match for domain in report.domains.values()):
        console.print(_exact_answers(report))
        _summarize_answers(list(report.domains.values()), console)
    print_router_report(report.routing, console)


def print_changes(changes: list[Change], before: str | None, console: Console) -> None:
    """What became worse than in the evaluation `before`; None where there was none like it."""
    if before is None:
        console.print("no earlier evaluation on the same rows to compare with")
    elif not changes:
        console.print(f"[green]nothing is worse than in {before}[/]", highlight=False)
    else:
        table = Table(title=f"[red]worse than in {before}[/]", title_justify="left")
        table.add_column("domain", no_wrap=True)
        table.add_column("figure")
        table.add_column("before", justify="right")
        table.add_column("now", justify="right")
        for one in changes:
            table.add_row(one.domain, one.figure, f"{one.before:.3f}", "gone" if one.now is None else f"{one.now:.3f}")
        console.print(table)


def _losses(report: Report) -> Table:
    table = Table(title=f"loss per token, {report.split} split, generation {report.generation}", title_justify="left")
    table.add_column("domain", no_wrap=True)
    for name in ("base", "routed", "oracle", "worst", "strange", "right", "none"):
        table.add_column(name, justify="right")
    table.add_column("worst is", no_wrap=True)
    for name, d in report.domains.items():
        of_loss = (d.loss.base, d.loss.routed, d.loss.oracle, d.loss.worst, d.loss.strange)
        losses = (f"{value:.3f}" for value in of_loss)
        table.add_row(name, *losses, f"{d.routed_right:.1%}", f"{d.abstained:.1%}", d.loss.worst_adapter)
    return table


def _summarize_losses(domains: list[DomainReport], console: Console) -> None:
    routed, oracle = mean(d.loss.routed for d in domains), mean(d.loss.oracle for d in domains)
    console.print(
        f"routed right {mean(d.routed_right for d in domains):.2%}, to none {mean(d.abstained for d in domains):.2%}; "
        f"routed loss over oracle's: {routed / oracle - 1:+.2%} of the means, "
        f"{max(d.loss.routed / d.loss.oracle - 1 for d in domains):+.2%} in the worst domain; "
        f"adapters better than the base: {sum(d.loss.oracle < d.loss.base for d in domains)} of {len(domains)}",
        highlight=False,
    )


def _summarize_regret(domains: list[DomainReport], console: Console) -> None:
    console.print(
        f"regret, nats per token: in domain, beside its own adapter, {mean(d.loss.regret for d in domains):+.4f} "
        f"(most {max(d.loss.regret for d in domains):+.4f}); out of domain, unknown to the router, beside the base, "
        f"{mean(d.loss.strange_regret for d in domains):+.4f} "
        f"(most {max(d.loss.strange_regret for d in domains):+.4f}), "
        f"{mean(d.strange_abstained for d in domains):.1%} sent to the base",
        highlight=False,
    )


def _exact_answers(report: Report) -> Table:
    table = Table(title="share of exact answers", title_justify="left")
    table.add_column("domain", no_wrap=True)
    for name in ("base", "routed", "oracle", "wrong"):
        table.add_column(name, justify="right")
    table.add_column("wrong is", no_wrap=True)
    for name, domain in report.domains.items():
        if (match := domain.exact_match) is not None:
            shares = (f"{share:.2f}" for share in (match.base, match.routed, match.oracle, match.wrong))
            table.add_row(name, *shares, match.wrong_adapter)
    return table


def _summarize_answers(domains: list[DomainReport], console: Console) -> None:
    matches = [domain.exact_match for domain in domains if domain.exact_match is not None]
    console.print(
        f"exact answers: routed {mean(m.routed for m in matches):.3f} (least {min(m.routed for m in matches):.2f}), "
        f"base {mean(m.base for m in matches):.3f}, wrong adapter {mean(m.wrong for m in matches):.3f}",
        highlight=False,
    )
