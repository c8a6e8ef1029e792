"""Stage 3: tiny ada, trained on the prompts of every domain and published as `router/<version>`."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from cluster.config.training import StageSettings
from cluster.errors import StageOrder
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.messages import NONE_DOMAIN, RoutingDecision
from cluster.router.fit import RouterFit
from cluster.router.sentence_model import find_sentence_model
from cluster.router.tiny_ada import TinyAda
from cluster.training.artifacts import publish_for_base, published_base, require_adapters
from cluster.training.data import DataSet, Row, prompts_to_route, stage_data
from cluster.training.provenance import write_provenance
from cluster.training.run import Run


def train_router(settings: StageSettings, run: Run) -> None:
    """Train the router on the data's train split, calibrate it on the validation split, and publish it."""
    recipe = settings.recipe
    catalog = Catalog(settings.root)
    state = catalog.load()
    base = published_base(settings.root, state)
    require_adapters(settings.root, state)
    data = stage_data(settings, run)
    # Another domain's adapter answers for one that is an alias.
    if missing := set(data.domains) - state.adapters.keys() - state.aliases.keys():
        raise StageOrder(f"Domain {min(missing)!r} has no adapter yet; run stage 'adapters' on this data first.")
    train, val = (router_rows(data, split, recipe.train_rows_per_domain) for split in ("train", "val"))
    if recipe.router.sentence_encoder is not None:
        folder = find_sentence_model(recipe.router.sentence_encoder)
        num_prompts = len(train) + len(val)
        run.say(f"the sentence encoder in {folder.name} is tuned, and then reads {num_prompts:,} prompts, each once")
    topics = [row.topic for row in train]
    fit = RouterFit(*router_columns(train), *router_columns(val), recipe.router, base.num_parameters, topics)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its products are so small that a second thread only waits for the first
    try:
        _fit(fit, settings, run)
    finally:
        torch.set_num_threads(num_threads)
    router = fit.finish()
    version = publish_router(router, "router", settings)
    publish_for_base(catalog, Change(router=version), state.base)
    share = router.num_parameters / base.num_parameters
    run.say(f"tiny ada: {router.num_parameters:,} parameters, {share:.1%} of the base's")
    run.say(f"published router {version}: validation {routing_summary(router, val)}")


def router_rows(data: DataSet, split: str, limit: int) -> list[Row]:
    """What the router learns from or is measured on: the prompts of every domain and of none."""
    return [row for domain in (*data.domains, NONE_DOMAIN) for row in data.rows(split, domain, limit)]


def publish_router(router: TinyAda, stage: str, settings: StageSettings) -> int:
    """Write the router as its next version and return the number. Not current until the catalog says so."""

    def write(folder: Path) -> None:
        router.save(folder)
        write_provenance(folder, stage, settings)

    return write_version(settings.root / "router", write)


def chosen_domain(decision: RoutingDecision) -> str:
    """The domain with the largest weight, or "none"."""
    return max(decision.weights, key=lambda name: decision.weights[name], default=NONE_DOMAIN)


def routing_summary(router: TinyAda, rows: Sequence[Row]) -> str:
    """Accuracy on domains' bare prompts, how many of them were turned away, and how many of no domain were."""
    decisions = router.route([row.bare_prompt for row in rows])
    counts: Counter[str] = Counter()
    for row, decision in zip(rows, decisions, strict=True):
        chosen = chosen_domain(decision)
        kind = "none" if row.domain == NONE_DOMAIN else "domain"
        counts[kind] += 1
        counts[f"{kind} right"] += chosen == row.domain
        counts[f"{kind} to none"] += chosen == NONE_DOMAIN
    text = f"accuracy {counts['domain right'] / max(1, counts['domain']):.1%}"
    text += f", {counts['domain to none'] / max(1, counts['domain']):.1%} of the domains' prompts turned away"
    if counts["none"]:
        text += f", {counts['none to none'] / counts['none']:.1%} of the prompts of no domain"
    return text


def router_columns(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The rows' prompts, as they are sent and bare in turn, and their domains."""
    return prompts_to_route(rows), [row.domain for row in rows]


def _fit(fit: RouterFit, settings: StageSettings, run: Run) -> None:
    first = 0
    if (checkpoint := run.restore()) is not None:
        first = fit.load(checkpoint)
        run.say(f"resuming the router at step {first}")
    run.start("3/4 router", fit.num_steps)
    loss, since = math.nan, time.perf_counter()
    for step in range(first, fit.num_steps):
        value = fit.step()
        loss = value if math.isnan(loss) else 0.95 * loss + 0.05 * value
        done = step + 1
        run.report(done, {"loss": loss, "prompts/s": (done - first) * fit.batch_size / (time.perf_counter() - since)})
        if done % settings.recipe.checkpoint_every_steps == 0:
            run.checkpoint(fit.save)
