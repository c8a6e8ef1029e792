"""A library of adapters from raw data to a server: every stage in one job, evaluation, four shards that serve, pruning.

The test split is read once everything is trained, and the validation split decides what is pruned.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Measurement, Measurements
from benchmarks.served_system import served_system
from benchmarks.training_run import QuietRun
from cluster.config.places import CHECKOUT
from cluster.errors import InvalidInput
from cluster.lora.catalog import Catalog
from cluster.messages import AdapterRef
from cluster.training.artifacts import published_adapter, published_base, published_router
from cluster.training.data import encode, read_data
from cluster.training.evaluation import EvaluationSettings, Report, evaluate
from cluster.training.mixture_losses import MixtureLosses, mixture_of
from cluster.training.one_pass import mean_losses
from cluster.training.pipeline import is_trained, live_recipe
from cluster.training.pruning import PruneSettings, prune
from cluster.training.pruning_report import apply
from cluster.training.recipes import recipe
from deployments.commands.report import print_report

_COLUMNS = ("domain", "prompt", "response", "split", "prompt_bare")
_NUM_SHARDS = 4


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is trained and measured."""

    recipe: str
    domains: int | None = None
    """The first so many; all by default."""
    rows_per_domain: int = 100_000
    """Of each split."""
    test_rows: int = 100
    worst_rows: int = 24


class Trained:
    """A system that one job trained on a table of rows, in a folder of its own; or has trained there before."""

    def __init__(self, table: pa.Table, amount: Amount, folder: Path, num_cpus: int, console: Console) -> None:
        self.root, self.data, self.amount, self._console = folder / "root", folder / "data", amount, console
        self.seconds: float | None = None
        """What training took; None where it was done before."""
        rows, file = _cut(table, amount), self.data / "rows.parquet"
        if is_trained(self.root) and live_recipe(self.root) == amount.recipe and pq.read_table(file).equals(rows):
            console.print(f"trained before: {self.root}", highlight=False)
            return
        self.data.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, file)
        command = (sys.executable, "-m", "deployments.train", "all", "--recipe", amount.recipe)
        where = ("--root", str(self.root), "--data", str(self.data), "--cpus", str(num_cpus))
        since = time.perf_counter()
        subprocess.run([*command, *where], cwd=CHECKOUT, stdout=sys.stderr, check=True)
        self.seconds = time.perf_counter() - since
        console.print(f"trained in {self.seconds:,.0f} s", highlight=False)

    def evaluate(self) -> Report:
        """On the test split."""
        amount = self.amount
        settings = EvaluationSettings(
            self.root, self.data, rows_per_domain=amount.test_rows, worst_rows=amount.worst_rows
        )
        since = time.perf_counter()
        report = evaluate(settings, QuietRun())
        self._console.print(f"evaluated in {time.perf_counter() - since:,.0f} s", highlight=False)
        return report

    def joint_changes(self) -> dict[str, float]:
        """The rise of each domain's validation loss by the joint stage, as a share; empty if it published nothing."""
        settings = recipe(self.amount.recipe)
        data, state = read_data(self.data), Catalog(self.root).load()
        base = published_base(self.root, state)
        rows = {d: data.rows("val", d, settings.val_rows_per_domain) for d, v in state.adapters.items() if v == 2}
        examples = {d: encode(base.tokenizer, some, settings.joint.max_tokens) for d, some in rows.items() if some}
        before, after = (
            mean_losses(base, {d: published_adapter(self.root, AdapterRef(d, version)) for d in examples}, examples)
            for version in (1, 2)
        )
        return {domain: after[domain] / before[domain] - 1 for domain in examples}

    def serve(self) -> Measurements:
        """One test prompt of each domain over HTTP from `_NUM_SHARDS` shards, beside the router asked directly."""
        data, state = read_data(self.data), Catalog(self.root).load()
        router = published_router(self.root, state)
        rows = [row for domain in state.adapters for row in data.rows("test", domain, 1)]
        decisions = router.route([row.prompt for row in rows])
        found, same = 0, 0
        with (
            served_system(self.root, shards=_NUM_SHARDS, copies=1) as system,
            httpx.Client(base_url=system.http, timeout=120) as client,
        ):
            since = time.perf_counter()
            for row, decision in zip(rows, decisions, strict=True):
                answer = client.post("/v1/completions", json={"prompt": row.prompt, "max_tokens": 8})
                answer.raise_for_status()
                served = answer.json()["zephyra"]["mixture"]
                weights = {ref.partition("@")[0]: weight for ref, weight in served.items()}
                found += max(weights, key=lambda name: weights[name], default="none") == row.domain
                same += weights == decision.weights
            seconds = time.perf_counter() - since
        self._console.print(
            f"served from {_NUM_SHARDS} shards: {len(rows)} prompts, one of each domain, one after the other in "
            f"{seconds:.0f} s; {found} found their domain, {same} had the very mixture that the router gives them",
            highlight=False,
        )
        shares = {"served_right": found / len(rows), "served_as_routed": same / len(rows)}
        return {name: Measurement((share,)) for name, share in shares.items()}

    def prune_to_half(self) -> Measurements:
        """What half the adapters cost: the rise of the routed test losses as a share, on average and at the most.

        Of all domains, also those that no adapter answers for any more. Chosen by the validation split, and published,
        in a copy.
        """
        num = len(Catalog(self.root).load().adapters)
        since = time.perf_counter()
        before = self._routed_losses(self.root)
        with tempfile.TemporaryDirectory(dir=self.root.parent) as folder:
            root = Path(folder) / "root"
            shutil.copytree(self.root, root)
            proposal = prune(PruneSettings(root, self.data, keep=num - num // 2, epsilon=1e9), QuietRun())
            apply(root, proposal)
            after = self._routed_losses(root)
        changes = {domain: after[domain] / before[domain] - 1 for domain in before}
        worst = max(changes, key=changes.__getitem__)
        accepted = [step for step in proposal.report.steps if step.accepted]
        self._console.print(
            f"pruned from {num} to {proposal.report.num_kept} adapters in {time.perf_counter() - since:.0f} s: "
            f"{sum(step.into is None for step in accepted)} dropped, "
            f"{sum(step.into is not None for step in accepted)} combined; routed loss on the test split "
            f"{mean(before.values()):.4f} -> {mean(after.values()):.4f}, the most in {worst}, {changes[worst]:+.1%}; "
            f"{sum(change > 0.02 for change in changes.values())} domains lose more than 2 %",
            highlight=False,
        )
        return {
            "prune_half_mean_change": Measurement((mean(changes.values()),)),
            "prune_half_worst_change": Measurement((changes[worst],)),
        }

    def _routed_losses(self, root: Path) -> dict[str, float]:
        """Nats per token of each domain's test rows, through what the router chooses."""
        data, state = read_data(self.data), Catalog(root).load()
        refs = {name: state.ref(name) for name in (*state.adapters, *state.aliases)}
        router = published_router(root, state)
        losses = MixtureLosses(published_base(root, state), max_tokens=384)
        losses.adapters.update({ref: published_adapter(root, ref) for ref in set(refs.values())})
        found = {}
        for domain in data.domains:
            rows = data.rows("test", domain, self.amount.test_rows)
            decisions = router.route([row.prompt for row in rows])
            found[domain] = losses.mean(rows, [mixture_of(decision.weights, refs) for decision in decisions])
        return found


def open_domains(data: Path, folder: Path, quick: bool, num_cpus: int, console: Console) -> Measurements:
    """The 13 open domains: their table, and what the joint stage changed. Trained in `folder`."""
    amount = Amount("trial", 4, 300, 8, 4) if quick else Amount("open-domains")
    trained = Trained(_read(sorted(data.glob("*.parquet"))), amount, folder, num_cpus, console)
    report = trained.evaluate()
    print_report(report, console)
    changes = trained.joint_changes()
    console.print(
        f"joint stage, change of validation loss: {', '.join(f'{d} {c:+.2%}' for d, c in changes.items())}",
        highlight=False,
    )
    worst = max(changes.values(), default=0.0)
    return {**_figures(report), "joint_worst_domain_change": Measurement((worst,)), **_seconds(trained)}


def many_tasks(data: Path, folder: Path, quick: bool, num_cpus: int, console: Console) -> Measurements:
    """The 275 tasks: the same table by family, served from four shards, and pruned to half. Trained in `folder`."""
    amount = Amount("trial", 8, 80, 8, 4) if quick else Amount("many-tasks", test_rows=20, worst_rows=4)
    table, families = read_tasks(data)
    trained = Trained(table, amount, folder, num_cpus, console)
    report = trained.evaluate()
    console.print(_by_family(report, families))
    figures = {**_figures(report), **trained.serve(), **_seconds(trained)}
    return {**{f"manytask_{name}": one for name, one in figures.items()}, **trained.prune_to_half()}


def _figures(report: Report) -> Measurements:
    losses = [domain.loss for domain in report.domains.values()]
    values = {
        "routed_over_oracle_loss": mean(loss.routed for loss in losses) / mean(loss.oracle for loss in losses),
        "routed_right": mean(domain.routed_right for domain in report.domains.values()),
        "bare_routed_right": report.routing.accuracy,
        "adapters_better_than_base": float(sum(loss.oracle < loss.base for loss in losses)),
        "domains": float(len(losses)),
    }
    return {name: Measurement((value,)) for name, value in values.items()}


def _seconds(trained: Trained) -> Measurements:
    return {} if trained.seconds is None else {"train_s": Measurement((trained.seconds,))}


def _by_family(report: Report, families: Mapping[str, str]) -> Table:
    """Means over each family's tasks, in nats per token."""
    groups = defaultdict(list)
    for name, domain in report.domains.items():
        groups[families[name]].append(domain)
    table = Table(title="loss per token by family, test split", title_justify="left")
    table.add_column("family", no_wrap=True)
    for name in ("tasks", "base", "routed", "oracle", "worst", "better than base", "right", "none"):
        table.add_column(name, justify="right")
    for family, domains in (*sorted(groups.items()), ("all", list(report.domains.values()))):
        losses = [domain.loss for domain in domains]
        table.add_row(
            family,
            str(len(domains)),
            *(f"{mean(getattr(loss, name) for loss in losses):.3f}" for name in ("base", "routed", "oracle", "worst")),
            str(sum(loss.oracle < loss.base for loss in losses)),
            f"{mean(domain.routed_right for domain in domains):.0%}",
            f"{mean(domain.abstained for domain in domains):.0%}",
        )
    return table


def read_tasks(data: Path) -> tuple[pa.Table, dict[str, str]]:
    """The tasks' rows with names that can be a domain's, and the family of each. Raises `InvalidInput` for no file."""
    table = _read([data / "manytask.parquet"])
    names = [re.sub(r"[^a-z0-9_-]", "_", task.lower().replace("/", "-")) for task in table["task"].to_pylist()]
    families = dict(zip(names, table["family"].to_pylist(), strict=True))
    return table.append_column("domain", pa.array(names)), families


def _read(files: list[Path]) -> pa.Table:
    if not files or not all(file.is_file() for file in files):
        raise InvalidInput(f"There is no data at {', '.join(map(str, files)) or 'that place'}; name it with --data.")
    return pa.concat_tables([pq.read_table(file) for file in files], promote_options="default")


def _cut(table: pa.Table, amount: Amount) -> pa.Table:
    """The columns of training data, of so many domains and so many rows of each split."""
    table = table.select([name for name in _COLUMNS if name in table.column_names])
    domains = sorted(set(table["domain"].to_pylist()))[: amount.domains]
    counts: dict[tuple[str, str], int] = defaultdict(int)
    kept = []
    for domain, split in zip(table["domain"].to_pylist(), table["split"].to_pylist(), strict=True):
        counts[domain, split] += 1
        kept.append(domain in domains and counts[domain, split] <= amount.rows_per_domain)
    return table.filter(pa.array(kept))
