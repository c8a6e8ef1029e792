"""The evaluation's report as a table on the terminal."""

from rich.console import Console
from rich.table import Table

from cluster.training.evaluation import Report


def print_report(report: Report, console: Console) -> None:
    """One row per domain, and the means."""
    table = Table(title=f"{report.split} split, catalog generation {report.generation}", title_justify="left")
    table.add_column("domain")
    for name in ("rows", "routed right", "abstained", "loss base", "routed", "oracle", "worst", "(adapter)"):
        table.add_column(name, justify="right")
    checked = any(domain.exact_match for domain in report.domains.values())
    for name in ("exact base", "routed", "oracle", "wrong", "(adapter)") if checked else ():
        table.add_column(name, justify="right")
    for name, d in report.domains.items():
        losses = (f"{value:.3f}" for value in (d.loss.base, d.loss.routed, d.loss.oracle, d.loss.worst))
        cells = [str(d.rows), f"{d.routed_right:.1%}", f"{d.abstained:.1%}", *losses, d.loss.worst_adapter]
        if checked:
            e = d.exact_match
            cells += [f"{v:.2f}" for v in (e.base, e.routed, e.oracle, e.wrong)] + [e.wrong_adapter] if e else ["-"] * 5
        table.add_row(name, *cells)
    console.print(table)
    domains = list(report.domains.values())
    ratios = [d.loss.routed / d.loss.oracle - 1 for d in domains]
    routed, oracle = (sum(getattr(d.loss, kind) for d in domains) / len(domains) for kind in ("routed", "oracle"))
    console.print(
        f"routing accuracy {sum(d.routed_right for d in domains) / len(domains):.2%}, abstained "
        f"{sum(d.abstained for d in domains) / len(domains):.2%}; routed loss over oracle's: mean "
        f"{routed / oracle - 1:+.2%}, worst domain {max(ratios):+.2%}; adapters better than the base: "
        f"{sum(d.loss.oracle < d.loss.base for d in domains)} of {len(domains)}",
        highlight=False,
    )
    if matches := [d.exact_match for d in domains if d.exact_match]:
        means = {kind: sum(getattr(m, kind) for m in matches) / len(matches) for kind in ("routed", "base", "wrong")}
        console.print(
            f"exact answers: routed {means['routed']:.3f} (least {min(m.routed for m in matches):.2f}), "
            f"base {means['base']:.3f}, wrong adapter {means['wrong']:.3f}",
            highlight=False,
        )
    if report.none_abstained is not None:
        console.print(f"prompts of no domain sent to the base: {report.none_abstained:.1%} of {report.none_rows}")
