"""Stage 4: adapters and router fine-tuned together, so that the language-model loss reaches the router.

Each prompt goes through the soft mixture that the router gives it; the router's labels are a second, supervised term;
the base stays frozen. Afterwards the router's prototypes and temperature are fitted anew. The result is published
only if no domain lost: else the artifacts of stage 3 stay, and the reason is printed.
"""

import copy
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from cluster.config import StageSettings
from cluster.errors import CatalogConflict, StageOrder
from cluster.lora.catalog import Catalog, CatalogState, Change
from cluster.messages import NONE_DOMAIN
from cluster.model.base import Base
from cluster.router.tiny_ada import TinyAda
from cluster.training.artifacts import published_adapter, published_base, require_adapters, trained_router
from cluster.training.data import DataSet, Row, collate, encode, stage_data
from cluster.training.language_model import batch_loss, mean_loss
from cluster.training.optimization import Optimizer, load_checkpoint, save_checkpoint
from cluster.training.provenance import provenance
from cluster.training.run import Run
from cluster.training.stage_adapters import padding_id, publish_adapter
from cluster.training.stage_router import chosen_domain, publish_router, router_columns, router_rows, routing_summary
from cluster.training.trainable_lora import TrainableAdapters

_CLEARLY_BETTER = 0.01
"""Share of held-out prompts by which rebuilt prototypes must route better to be taken."""


@dataclass(frozen=True, slots=True)
class _System:
    """What is trained together; the router stays on the CPU, where its numbers are few."""

    base: Base
    adapters: TrainableAdapters
    router: TinyAda


def train_joint(settings: StageSettings, run: Run) -> None:
    """Fine-tune all adapters and the router together; publish them in one generation, or nothing."""
    if settings.recipe.joint.num_steps == 0:
        run.say("the recipe leaves the joint stage out")
        return
    catalog = Catalog(settings.root)
    state = catalog.load()
    system = _load(settings, state, run)
    data = stage_data(settings, run)
    domains = system.adapters.domains
    before = _losses(system, data, settings)
    if not before:
        run.say("not trained: without validation rows nobody could tell whether a domain loses")
        return
    _fit(system, data, settings, run)
    labels = {*system.router.domains, NONE_DOMAIN}
    train, held_out = (
        [row for row in router_rows(data, split, settings.recipe.train_rows_per_domain) if row.domain in labels]
        for split in ("train", "val")
    )
    router = _calibrated(system.router, train, held_out, settings.recipe.router.target_false_rejection)
    after = _losses(system, data, settings)
    changes = {domain: after[domain] / before[domain] - 1 for domain in before}
    table = ", ".join(f"{domain} {change:+.1%}" for domain, change in changes.items())
    run.say(f"joint stage, change of validation loss: {table}; router {routing_summary(router, held_out)}")
    if (loser := _loser(before, after, settings)) is not None:
        run.say(
            f"not published: {loser} lost {changes[loser]:.1%}, more than {settings.recipe.joint.epsilon:.1%}; "
            "the adapters and the router of stage 3 stay"
        )
        return
    made = provenance("joint", settings)
    published = {
        domain: publish_adapter(
            settings.root, domain, system.adapters.weights(domain, system.base.fingerprint), system.base.name, made
        )
        for domain in domains
    }
    version = publish_router(router, "joint", settings)
    _publish(catalog, state, Change(adapters=published, router=version))
    run.say(f"published {len(published)} adapters and router {version}")


def _publish(catalog: Catalog, trained: CatalogState, change: Change) -> None:
    """Publish unless something that was trained is no longer current; other domains may have come and gone meanwhile.

    Raises `CatalogConflict`.
    """
    while True:
        state = catalog.load()
        now, then = ((s.base, s.router, *(s.adapters.get(name) for name in change.adapters)) for s in (state, trained))
        if now != then:
            raise CatalogConflict("The base, the router or an adapter changed during the joint stage; run it again.")
        try:
            catalog.publish(change, expected_generation=state.generation)
        except CatalogConflict:
            continue
        return


def _load(settings: StageSettings, state: CatalogState, run: Run) -> _System:
    base = published_base(settings.root, state, device=run.workers.device)
    require_adapters(settings.root, state)
    router = trained_router(settings.root, state)
    if combined := sorted(set(router.domains) & state.aliases.keys()):
        raise StageOrder(
            f"{combined[0]!r} has no adapter of its own, {state.aliases[combined[0]]!r} answers for it; the joint "
            "stage needs one of each domain: run stages adapters and router first."
        )
    for withdrawn in set(router.domains) - set(state.adapters):
        router = router.without_domain(withdrawn)
    published = {domain: published_adapter(settings.root, state.ref(domain)) for domain in router.domains}
    return _System(base, TrainableAdapters(base.model, published), router)


def _losses(system: _System, data: DataSet, settings: StageSettings) -> dict[str, float]:
    """Validation loss of each domain through its own adapter alone."""
    losses = {}
    for domain in system.adapters.domains:
        rows = data.rows("val", domain, settings.recipe.val_rows_per_domain)
        if rows:
            system.adapters.select(domain)
            examples = encode(system.base.tokenizer, rows, settings.recipe.joint.max_tokens)
            losses[domain] = mean_loss(system.base.model, examples, padding_id(system.base.tokenizer))
    return losses


def _calibrated(router: TinyAda, train: list[Row], held_out: list[Row], target: float) -> TinyAda:
    """The router with temperature and threshold fitted anew, and its prototypes too if that clearly routes better.

    The encoder was trained against the prototypes, so they mostly still stand where they should.
    """
    rebuilt = copy.deepcopy(router)
    rebuilt.refit(*router_columns(train), *router_columns(held_out), target)
    router.recalibrate(*router_columns(held_out), target)
    gain = _share_right(rebuilt, held_out) - _share_right(router, held_out)
    return rebuilt if gain > _CLEARLY_BETTER else router


def _share_right(router: TinyAda, rows: list[Row]) -> float:
    decisions = router.route([row.bare_prompt for row in rows])
    return sum(chosen_domain(d) == row.domain for d, row in zip(decisions, rows, strict=True)) / len(rows)


def _loser(before: dict[str, float], after: dict[str, float], settings: StageSettings) -> str | None:
    """The domain that lost most, if it lost more than the recipe allows."""
    options = settings.recipe.joint
    worst = max(before, key=lambda domain: after[domain] / before[domain])
    allowed = max(before[worst] * options.epsilon, options.tolerance_nats)
    return worst if after[worst] - before[worst] > allowed else None


def _fit(system: _System, data: DataSet, settings: StageSettings, run: Run) -> None:
    recipe, options = settings.recipe, settings.recipe.joint
    factors = {
        f"{domain}:{name}": parameter
        for domain in system.adapters.domains
        for name, parameter in system.adapters.parameters(domain).items()
    }
    adapters = Optimizer(factors, options.adapter_learning_rate, max(1, options.num_steps))
    encoder = {name: parameter for name, parameter in system.router.named_parameters() if parameter.requires_grad}
    router = Optimizer(encoder, options.router_learning_rate, max(1, options.num_steps))
    known = set(system.adapters.domains) & set(data.domains)
    rows = {domain: data.rows("train", domain, recipe.train_rows_per_domain) for domain in sorted(known)}
    if none_rows := data.rows("train", NONE_DOMAIN, recipe.train_rows_per_domain):
        # Without these the router would only be rewarded for naming some domain.
        rows[NONE_DOMAIN] = none_rows
    first = 0
    if (checkpoint := run.restore()) is not None:
        first, tensors = load_checkpoint(checkpoint)
        adapters.load_tensors(tensors, "adapters|")
        router.load_tensors(tensors, "router|")
        run.say(f"resuming the joint stage at step {first}")
    run.start("4/4 joint", options.num_steps)
    tokens, since = 0, time.perf_counter()
    for step in range(first, options.num_steps):
        loss, num_tokens = _joint_loss(system, _draw(rows, step, settings), settings)
        loss.backward()
        adapters.step(step)
        router.step(step)
        tokens += num_tokens
        run.report(step + 1, {"loss": float(loss.detach()), "tokens/s": tokens / (time.perf_counter() - since)})
        if (step + 1) % recipe.checkpoint_every_steps == 0:
            done, state = step + 1, {**adapters.tensors("adapters|"), **router.tensors("router|")}
            run.checkpoint(partial(save_checkpoint, step=done, tensors=state))


def _draw(rows: dict[str, list[Row]], step: int, settings: StageSettings) -> list[Row]:
    """Rows of a step, evenly over the domains."""
    generator = torch.Generator().manual_seed(settings.recipe.seed * 1_000_003 + step)
    return [
        candidates[int(torch.randint(len(candidates), (), generator=generator))]
        for candidates in rows.values()
        for _ in range(settings.recipe.joint.rows_per_domain)
    ]


def _joint_loss(system: _System, rows: list[Row], settings: StageSettings) -> tuple[torch.Tensor, int]:
    """Language-model loss through soft mixtures plus the weighted loss of the router's labels, and the tokens seen."""
    options = settings.recipe.joint
    log_probabilities_BN = system.router.scores([row.prompt for row in rows])
    examples = encode(system.base.tokenizer, rows, options.max_tokens)
    batch = collate([[example] for example in examples], padding_id(system.base.tokenizer), learn_prompts=False)
    # The last column is none: its probability is the share of the plain base.
    device = system.base.model.device
    system.adapters.mix(log_probabilities_BN[:, :-1].exp().to(device), batch.ids_BT.shape[1])
    names = (*system.router.domains, NONE_DOMAIN)
    labels = torch.tensor([names.index(row.domain) for row in rows])
    routing = nn.functional.nll_loss(log_probabilities_BN, labels)
    loss = batch_loss(system.base.model, batch) + options.router_loss_weight * routing.to(device)
    return loss, batch.ids_BT.numel()
