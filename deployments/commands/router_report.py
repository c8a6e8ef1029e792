"""The router's measurements and explanations as tables on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.messages import NONE_DOMAIN
from cluster.router.explanation import Explanation
from cluster.training.router_evaluation import RouterReport

_NUM_PROBABILITIES = 5
_MAX_EXAMPLE_CHARACTERS = 60


def print_router_report(report: RouterReport, console: Console) -> None:
    """A row per domain, the confusions, and the figures over all."""
    table = Table(title=f"the router on the {report.split} split", title_justify="left")
    table.add_column("domain", no_wrap=True)
    for name in ("rows", "right", "turned away"):
        table.add_column(name, justify="right")
    for name, domain in report.domains.items():
        table.add_row(name, str(domain.rows), f"{domain.right:.1%}", f"{domain.turned_away:.1%}")
    console.print(table)
    if report.confusions:
        confused = Table(title="most common confusions", title_justify="left")
        confused.add_column("domain", no_wrap=True)
        confused.add_column("routed to", no_wrap=True)
        confused.add_column("rows", justify="right")
        confused.add_column("for example")
        for one in report.confusions:
            confused.add_row(one.domain, one.routed_to, str(one.rows), escape(_short(one.example)))
        console.print(confused)
    console.print(
        f"accuracy {report.accuracy:.2%}, turned away {report.turned_away:.2%}; "
        f"calibration error {report.calibration_error:.4f}; {report.effective_domains:.1f} of {len(report.domains)} "
        f"domains used in effect; {report.p50_ms:.2f} ms per prompt (p50); {report.parameters:,} parameters",
        highlight=False,
    )
    if report.none_to_base is not None:
        console.print(
            f"prompts of no domain sent to the base: {report.none_to_base:.1%} of {report.none_rows}", highlight=False
        )


def print_explanation(explanation: Explanation, console: Console, num_effects: int) -> None:
    """The decision, the nearest prototypes, and the first `num_effects` parts of the text."""
    weights = explanation.decision.weights
    named = ", ".join(f"{name} {weight:.0%}" for name, weight in weights.items()) or "the plain base"
    probable = sorted(explanation.decision.probabilities.items(), key=lambda item: -item[1])
    shown = [item for i, item in enumerate(probable) if i < _NUM_PROBABILITIES or item[0] == NONE_DOMAIN]
    console.print(f"goes to [bold]{named}[/]", highlight=False)
    console.print("probabilities: " + ", ".join(f"{name} {value:.2%}" for name, value in shown), highlight=False)
    console.print(
        f"{explanation.domain} over {explanation.against}: {explanation.margin:+.2f} "
        f"(selected from {explanation.threshold:+.2f} over none)",
        highlight=False,
    )
    if explanation.is_data_free:
        console.print(f"{explanation.domain} is known by words of its adapter alone: a guess", highlight=False)
    near = Table(title="nearest prototypes", title_justify="left")
    near.add_column("domain", no_wrap=True)
    near.add_column("number", justify="right")
    near.add_column("product", justify="right")
    for prototype in explanation.nearest:
        near.add_row(prototype.domain, str(prototype.number), f"{prototype.product:.3f}")
    console.print(near)
    title = f"what speaks for {explanation.domain} (+) or {explanation.against} (-)"
    effects = Table(title=title, title_justify="left")
    effects.add_column("part")
    effects.add_column("kind", no_wrap=True)
    effects.add_column("effect", justify="right")
    for effect in explanation.effects[:num_effects]:
        effects.add_row(escape(_visible(effect.text)), effect.kind, f"{effect.effect:+.2f}")
    console.print(effects)


def _short(text: str) -> str:
    """`text` on one line, cut to a readable length."""
    line = " ".join(_visible(text).split())
    return line if len(line) <= _MAX_EXAMPLE_CHARACTERS else f"{line[:_MAX_EXAMPLE_CHARACTERS]}..."


def _visible(text: str) -> str:
    """`text` without what a terminal would obey or cannot show."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
