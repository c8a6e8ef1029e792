"""A domain that is added to a trained system: its adapter is learned over the frozen base, measured, and published.

Nothing else changes: no other adapter, not the base, not the trained router, whose other logits stay as they are.
What is measured is told, and what does not pass the gate is not published.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.config.training import LiveDomainSettings, StageSettings
from cluster.errors import GateRefused, InvalidInput
from cluster.lora import peft_format
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, Change
from cluster.lora.weights import AdapterWeights
from cluster.messages import check_domain_name
from cluster.model.base import Base
from cluster.router.domain_prototypes import DomainPrototypes, prototypes_from_examples, with_prototypes
from cluster.router.tiny_ada import TinyAda
from cluster.training.artifacts import published_router, trained_router, training_base
from cluster.training.compute import with_dtype
from cluster.training.data import Row, encode, read_data
from cluster.training.domain_data import examples_of, read_domain
from cluster.training.domain_version import publish_version, write_version
from cluster.training.one_pass import FitSettings, fit_adapters, mean_losses
from cluster.training.provenance import provenance
from cluster.training.run import Run
from cluster.training.stage_router import chosen_domain, router_rows

_WORST_OTHERS = 3
"""Of the other domains, those that lose most are told; if they pass, all do."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the gate."""

    what: str
    num_rows: int
    before: float | None
    """None where there was nothing before."""
    after: float
    limit: float
    is_share: bool
    """A share that must not fall below the limit; else a loss, in nats per token, that must stay below it."""

    @property
    def passes(self) -> bool:
        """Whether the domain may be published, for all that this line says."""
        return self.after >= self.limit if self.is_share else self.after < self.limit


def train_domain(settings: StageSettings, run: Run) -> None:
    """Train the domain that `settings.live` names and publish it, in one generation, if it passes the gate.

    Raises `GateRefused` where it does not, and `InvalidInput` for a name that cannot be one, or is an alias.
    """
    live, settings = settings.live, with_dtype(settings, run)
    if live is None:
        raise InvalidInput("Stage 'domain' needs the name of the domain; give one.")
    name, recipe = check_domain_name(live.domain), settings.recipe
    state = Catalog(settings.root).load()
    Change(adapters={name: 1}).check(state)
    base = training_base(settings, run, state)
    trained = trained_router(settings.root, state)
    data = read_domain(settings.data, name, recipe.bad_rows, live.held_out_share)
    others = _others(settings, live, run)
    for sentence in data.told:
        run.say(sentence)
    if name in state.adapters:
        run.say(f"{state.ref(name)} is published; this becomes its next version, which `domains rollback` takes back")
    train = data.train[: recipe.train_rows_per_domain]
    prompts = examples_of(train)
    assert state.router is not None
    # Before the adapter, which takes its time: they may be refused.
    prototypes = prototypes_from_examples(trained, state.router, name, prompts)
    how = FitSettings(recipe.adapters, recipe.seed, recipe.checkpoint_every_steps, f"adapter of {name}")
    examples = {name: encode(base.tokenizer, train, recipe.adapters.max_tokens)}
    weights = fit_adapters(base, examples, how, run)[name].weights
    weights.check_finite()
    held_out = data.held_out[: recipe.val_rows_per_domain]
    router = published_router(settings.root, state)
    measured = [
        _own_loss(base, weights, held_out, settings),
        *_routing(router, prototypes, held_out, others, live),
    ]
    run.say(table(measured))
    if failed := [line for line in measured if not line.passes]:
        what = "; ".join(f"{line.what} is {line.after:.3f}, the limit {line.limit:.3f}" for line in failed)
        raise GateRefused(f"{name!r} was not published, and nothing was changed: {what}.")
    made = {**provenance("domain", settings), "gate": [asdict(line) for line in measured]}

    def write_adapter(folder: Path) -> None:
        peft_format.save(folder, weights, f"base/{base.name}", made)

    store = Store.of(settings.root)
    after = publish_version(store, write_version(store, name, write_adapter, prototypes, prompts), state.base)
    run.say(f"published {after.ref(name)}: routed by {len(prompts):,} examples, in generation {after.generation}")


def table(measured: Sequence[Measured]) -> str:
    """What was measured, a line each."""
    width = max(len(line.what) for line in measured)
    lines = [f"{'measured':<{width}}  {'rows':>6}  {'before':>7}  {'after':>7}  {'limit':>9}"]
    for line in measured:
        form = "{:.1%}" if line.is_share else "{:.3f}"
        before = "-" if line.before is None else form.format(line.before)
        limit = f"{'>=' if line.is_share else '<'} {form.format(line.limit)}"
        verdict = "" if line.passes else "  refused"
        lines.append(
            f"{line.what:<{width}}  {line.num_rows:>6,}  {before:>7}  {form.format(line.after):>7}  {limit:>9}{verdict}"
        )
    return "\n".join(lines)


def _others(settings: StageSettings, live: LiveDomainSettings, run: Run) -> list[Row]:
    """Held-out rows of the domains that are there, and of none; empty where nobody knows their data."""
    if live.others is None or not live.others.is_dir():
        where = "are not known" if live.others is None else f"are no longer in {live.others}"
        run.say(f"the data of this root {where}: what other domains lose to {live.domain!r} is not measured")
        return []
    rows = router_rows(read_data(live.others, settings.recipe.bad_rows), "val", settings.recipe.val_rows_per_domain)
    return [row for row in rows if row.domain != live.domain]


def _own_loss(base: Base, weights: AdapterWeights, rows: Sequence[Row], settings: StageSettings) -> Measured:
    name = rows[0].domain
    examples = {name: encode(base.tokenizer, rows, settings.recipe.adapters.max_tokens)}
    plain, adapted = mean_losses(base, {}, examples)[name], mean_losses(base, {name: weights}, examples)[name]
    return Measured(f"loss of {name}, base -> adapter", len(rows), plain, adapted, limit=plain, is_share=False)


def _routing(
    before: TinyAda,
    prototypes: DomainPrototypes,
    own: Sequence[Row],
    others: Sequence[Row],
    live: LiveDomainSettings,
) -> Iterator[Measured]:
    """How much of its own prompts the new domain finds, and what the others keep of theirs."""
    name, after = live.domain, with_prototypes(before, {live.domain: prototypes}, ())
    found_before = _found(before, own)[name] if name in before.domains else None
    found = _found(after, own)[name]
    yield Measured(f"prompts of {name} that find it", len(own), found_before, found, live.least_recall, is_share=True)
    if not others:
        return
    was, now = _found(before, others), _found(after, others)
    for other in sorted(was, key=lambda other: now[other] - was[other])[:_WORST_OTHERS]:
        num_rows = sum(row.domain == other for row in others)
        limit = was[other] - live.epsilon
        yield Measured(f"prompts of {other} that find it", num_rows, was[other], now[other], limit, is_share=True)


def _found(router: TinyAda, rows: Sequence[Row]) -> dict[str, float]:
    """Of each domain's prompts, the share that the router sends to it."""
    decisions = router.route([row.bare_prompt for row in rows])
    hits: dict[str, list[bool]] = {}
    for row, decision in zip(rows, decisions, strict=True):
        hits.setdefault(row.domain, []).append(chosen_domain(decision) == row.domain)
    return {domain: sum(of_domain) / len(of_domain) for domain, of_domain in hits.items()}
