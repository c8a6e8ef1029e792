"""A pruning proposed: its report, kept in the root before anything changes, and what publishes it.

`apply` is one generation: new versions of what was combined, aliases for the domains that moved in, the rest withdrawn.
Files stay, so that `zephyra domains rollback` brings any adapter back.
"""

import json
from dataclasses import asdict
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.errors import CatalogConflict
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, CatalogState, Change, check_generation
from cluster.lora.store import LocalStorage
from cluster.lora.weights import AdapterWeights
from cluster.messages import AdapterRef
from cluster.training.pages import render, svg
from cluster.training.pruning import PruneReport, Pruning
from cluster.training.stage_adapters import publish_adapter

FOLDER = "prunings"
_TEMPLATE = "pruning.html"


def write_proposal(root: Path, report: PruneReport) -> Path:
    """Write JSON and a page as the root's next proposal; returns its folder."""

    def write(folder: Path) -> None:
        content = {**asdict(report), "changes": report.changes(), "num_kept": report.num_kept}
        (folder / "report.json").write_text(json.dumps(content, indent=2))
        page = render(_TEMPLATE, report=report, changes=report.changes(), losses=_losses(report), uses=_uses(report))
        (folder / "report.html").write_text(page)

    return root / FOLDER / str(LocalStorage(root).write_version(FOLDER, write))


def apply(root: Path, pruning: Pruning) -> CatalogState:
    """Publish it. Raises `CatalogConflict` when the catalog has moved on since it was measured."""
    catalog, report = Catalog(root), pruning.report
    state = catalog.load()
    check_generation(state, report.generation)
    moved = tuple(name for name in pruning.aliases if name in state.adapters)
    # Other names of what moved go along; without a word here they would be withdrawn with it.
    followed = {alias: pruning.aliases[name] for alias, name in state.aliases.items() if name in moved}
    versions = {name: _write(root, name, weights, state, report) for name, weights in pruning.combined.items()}
    change = Change(adapters=versions, withdrawn=(*pruning.dropped, *moved), aliases={**followed, **pruning.aliases})
    try:
        return catalog.publish(change, expected_generation=report.generation)
    except CatalogConflict:
        for name, version in versions.items():
            Store.of(root).discard_adapter(AdapterRef(name, version))
        raise


def _write(root: Path, name: str, weights: AdapterWeights, state: CatalogState, report: PruneReport) -> int:
    of = sorted(other for other, by in report.answered_by.items() if by == name)
    made = {"combined": of, "measured_at_generation": report.generation}
    return publish_adapter(root, name, weights, str(state.base), made)


def _losses(report: PruneReport) -> Markup:
    """After each accepted step: how far the loss had risen, of the worst domain and on average over all rows."""
    figure = Figure(figsize=(8, 3.5))
    axes: Axes = figure.subplots()
    accepted = [step for step in report.steps if step.accepted]
    kept = range(report.num_adapters, report.num_adapters - len(accepted) - 1, -1)
    axes.plot(kept, [0.0, *(100 * step.worst_change for step in accepted)], color="#d9534f", label="worst domain")
    axes.axhline(100 * report.epsilon, color="#9aa5b1", linewidth=1, label="the most allowed")
    axes.invert_xaxis()
    axes.set(xlabel="adapters kept", ylabel="rise of the loss, %")
    axes.legend(frameon=False)
    return svg(figure)


def _uses(report: PruneReport) -> Markup:
    figure = Figure(figsize=(8, 3.5))
    axes: Axes = figure.subplots()
    uses = report.uses.values()
    kept = {by for by in report.answered_by.values() if by is not None}
    colors = ["#2f6fde" if name in kept else "#d9534f" for name in report.uses]
    axes.scatter([use.mass for use in uses], [use.ablation_regret for use in uses], c=colors)
    if len(report.uses) <= 40:
        for name, use in report.uses.items():
            axes.annotate(name, (use.mass, use.ablation_regret), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="routing mass", ylabel="nats per token lost without it")
    return svg(figure)
