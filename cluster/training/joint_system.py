"""What the joint stage trains together, base, adapters and router: loaded, measured, published in one generation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from cluster.config.training import StageSettings
from cluster.errors import CatalogConflict, StageOrder
from cluster.lora.catalog import Catalog, CatalogState, Change
from cluster.lora.checksums import CHECKSUMS
from cluster.lora.store import write_version
from cluster.messages import NONE_DOMAIN
from cluster.model.base import Base, copy_base, fingerprint, written_dtype
from cluster.router.reliability import effective_number
from cluster.router.tiny_ada import TinyAda
from cluster.training.artifacts import published_adapter, published_base, require_adapters, trained_router
from cluster.training.data import DataSet, Row, encode
from cluster.training.language_model import mean_loss
from cluster.training.provenance import provenance, write_provenance
from cluster.training.run import Run
from cluster.training.stage_adapters import padding_id, publish_adapter
from cluster.training.stage_router import publish_router
from cluster.training.trainable_lora import TrainableAdapters


@dataclass(frozen=True, slots=True)
class JointSystem:
    """One base under the adapters of all domains; the router stays on the CPU, where its numbers are few."""

    base: Base
    adapters: TrainableAdapters
    router: TinyAda
    state: CatalogState
    """Of which they are."""
    trains_base: bool

    @property
    def base_parameters(self) -> dict[str, nn.Parameter]:
        """What of the base is trained: nothing where it is frozen."""
        return self.adapters.base_parameters() if self.trains_base else {}

    def losses(self, data: DataSet, settings: StageSettings) -> dict[str, float]:
        """Validation loss of each domain through its own adapter alone; of none's rows too where the base changes."""
        losses = {}
        for domain in (*self.adapters.domains, *([NONE_DOMAIN] if self.trains_base else [])):
            rows = data.rows("val", domain, settings.recipe.val_rows_per_domain)
            if rows:
                self.adapters.select(None if domain == NONE_DOMAIN else domain)
                examples = encode(self.base.tokenizer, rows, settings.recipe.joint.max_tokens)
                losses[domain] = mean_loss(self.base.model, examples, padding_id(self.base.tokenizer))
        return losses

    def round_base(self, settings: StageSettings) -> None:
        """Take of the base what its published form can hold: one that was saved in bfloat16 stays so."""
        dtype = written_dtype(_base_folder(settings, self.state))
        with torch.no_grad():
            for parameter in self.base_parameters.values():
                parameter.copy_(parameter.to(dtype))

    def publish(self, router: TinyAda, settings: StageSettings) -> str:
        """Publish all in one generation, and return a sentence on it.

        Raises `CatalogConflict` where something that was trained is no longer current.
        """
        change, mark = Change(), self.base.fingerprint
        if self.trains_base:
            version, mark = self._publish_base(settings)
            change = Change(base=version)
        made, name = provenance("joint", settings), str(change.base or self.base.name)
        published = {
            domain: publish_adapter(settings.root, domain, self.adapters.weights(domain, mark), name, made)
            for domain in self.adapters.domains
        }
        version = publish_router(router, "joint", settings)
        _publish(Catalog(settings.root), self.state, Change(change.base, published, router=version))
        first = f"base {change.base}, " if change.base is not None else ""
        return f"published {first}{len(published)} adapters and router {version}"

    def _publish_base(self, settings: StageSettings) -> tuple[int, str]:
        """The version and the fingerprint of the base as it is now; not current until the catalog says so."""
        before = _base_folder(settings, self.state)

        def write(folder: Path) -> None:
            copy_base(before, folder, weights=False)
            (folder / CHECKSUMS).unlink(missing_ok=True)
            with self.adapters.detached():
                nn.Module.to(self.base.model, written_dtype(before))
                self.base.model.save_pretrained(folder)
            write_provenance(folder, "joint", settings)

        version = write_version(settings.root / "base", write)
        return version, fingerprint(settings.root / "base" / str(version))


def load_system(settings: StageSettings, run: Run) -> JointSystem:
    """What the root holds. Raises `StageOrder` where something is missing, or could not be published together."""
    root, trains_base = settings.root, settings.recipe.joint.base_learning_rate > 0
    state = Catalog(root).load()
    base = published_base(root, state, device=run.workers.device)
    require_adapters(root, state)
    router = trained_router(root, state)
    if combined := sorted(set(router.domains) & state.aliases.keys()):
        raise StageOrder(
            f"{combined[0]!r} has no adapter of its own, {state.aliases[combined[0]]!r} answers for it; the joint "
            "stage needs one of each domain: run stages adapters and router first."
        )
    for withdrawn in set(router.domains) - set(state.adapters):
        router = router.without_domain(withdrawn)
    if trains_base and (others := sorted(set(state.adapters) - set(router.domains))):
        raise StageOrder(
            f"The joint stage is to change the base, and the adapter of {others[0]!r}, which was trained on it, is "
            "none of those that it trains: run stages adapters and router first, or leave the base frozen "
            "(base_learning_rate 0)."
        )
    published = {domain: published_adapter(root, state.ref(domain)) for domain in router.domains}
    adapters = TrainableAdapters(base.model, published)
    if trains_base:
        for parameter in adapters.base_parameters().values():
            parameter.requires_grad_(True)
    return JointSystem(base, adapters, router, state, trains_base)


def effective_domains(router: TinyAda, rows: Sequence[Row]) -> float:
    """As many domains, used equally, would be as diverse as the weights that these prompts are given.

    Prompts of none are left out.
    """
    mass: Counter[str] = Counter()
    for decision in router.route([row.prompt for row in rows if row.domain != NONE_DOMAIN]):
        mass.update(decision.weights)
    return effective_number(mass.values())


def _base_folder(settings: StageSettings, state: CatalogState) -> Path:
    return settings.root / "base" / str(state.base)


def _publish(catalog: Catalog, trained: CatalogState, change: Change) -> None:
    """Publish unless something that was trained is no longer current; other domains may have come and gone meanwhile,
    unless the base changes, to which all adapters belong. Tags name versions over the old base, and go with it.
    """
    while True:
        state = catalog.load()
        if _current(state, change) != _current(trained, change):
            raise CatalogConflict("The base, the router or an adapter changed during the joint stage; run it again.")
        # A new base takes back what belonged to the old, other names of the domains that come back at once too.
        aliases = state.aliases if change.base is not None else {}
        try:
            catalog.publish(replace(change, aliases=aliases), expected_generation=state.generation)
        except CatalogConflict:
            continue
        return


def _current(state: CatalogState, change: Change) -> tuple[int | None, int | None, Mapping[str, int | None]]:
    """What of a state must not have changed."""
    every = state.adapters.keys() if change.base is not None else change.adapters.keys()
    return state.base, state.router, {name: state.adapters.get(name) for name in every}
