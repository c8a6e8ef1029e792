"""An evaluation as one HTML file: the figures, three plots, every domain; what became worse is marked. No scripts, and
nothing that is fetched from elsewhere.
"""

from collections.abc import Collection

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.messages import NONE_DOMAIN
from cluster.training.evaluation import Report
from cluster.training.pages import render, svg

_TEMPLATE = "evaluation.html"
_MOST_IN_PLOT = 40
"""Domains: of more, those that routing costs most are drawn; the table has all."""
_KINDS = {"base": "#9aa5b1", "routed": "#2f6fde", "oracle": "#36a269", "worst": "#d9534f"}


def page(report: Report, worse: Collection[tuple[str, str]]) -> str:
    """The whole file. `worse` names domain and figure of what is to be marked."""

    def mark(domain: str, figure: str) -> Markup:
        return Markup(' class="worse"') if (domain, figure) in worse else Markup()

    return render(
        _TEMPLATE,
        report=report,
        routing=report.routing,
        worse=worse,
        mark=mark,
        losses=_losses(report),
        confusion=_confusion(report),
        reliability=_reliability(report),
    )


def _losses(report: Report) -> Markup:
    costly = sorted(report.domains, key=lambda name: report.domains[name].loss.regret, reverse=True)
    names = sorted(costly[:_MOST_IN_PLOT], reverse=True)
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(names)))
    axes: Axes = figure.subplots()
    for index, (kind, color) in enumerate(_KINDS.items()):
        places = [row + 0.3 - 0.2 * index for row in range(len(names))]
        values = [getattr(report.domains[name].loss, kind) for name in names]
        axes.barh(places, values, height=0.18, color=color, label=kind)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("nats per token")
    axes.legend(loc="lower right", frameon=False)
    return svg(figure)


def _confusion(report: Report) -> Markup:
    counts = report.routing.counts
    wrong = {name: sum(found.values()) - found.get(name, 0) for name, found in counts.items()}
    rows = sorted(sorted(counts, key=wrong.__getitem__, reverse=True)[:_MOST_IN_PLOT])
    columns = [*sorted({*rows} - {NONE_DOMAIN}), NONE_DOMAIN]
    shares = [[counts[row].get(column, 0) / sum(counts[row].values()) for column in columns] for row in rows]
    figure = Figure(figsize=(3 + 0.4 * len(columns), 2 + 0.35 * len(rows)))
    axes: Axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("routed to")
    axes.set_ylabel("belongs to")
    figure.colorbar(image, label="share of the row")
    return svg(figure)


def _reliability(report: Report) -> Markup:
    bins = [one for one in report.routing.bins if one.rows]
    most = max(one.rows for one in bins)
    figure = Figure(figsize=(5, 4))
    axes: Axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#9aa5b1", linewidth=1)
    sizes = [20 + 180 * one.rows / most for one in bins]
    axes.scatter([one.confidence for one in bins], [one.right for one in bins], s=sizes, color=_KINDS["routed"])
    axes.set(xlim=(0, 1.05), ylim=(-0.05, 1.05), xlabel="confidence", ylabel="share that was right")
    return svg(figure)
