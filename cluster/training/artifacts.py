"""What a stage needs from the stages before: the published base, adapters and router of a root."""

import torch

from cluster.config.places import Root
from cluster.config.training import StageSettings
from cluster.errors import CatalogConflict, StageOrder
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, CatalogState, Change
from cluster.lora.packed_adapter import pack
from cluster.lora.peft_format import unpack
from cluster.lora.weights import AdapterWeights
from cluster.messages import AdapterRef
from cluster.model.base import Base, load_base
from cluster.router.assembly import RouterAssembly
from cluster.router.tiny_ada import TinyAda
from cluster.training.compute import DTYPES
from cluster.training.run import Run


def published_base(
    root: Root | Store, state: CatalogState, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Base:
    """The current base. Raises `StageOrder` when none has been published."""
    if state.base is None:
        raise StageOrder(f"{_named(root)} holds no base yet; run stage 'base' first, or `zephyra train all`.")
    return load_base(Store.of(root).folder(f"base/{state.base}"), dtype, device)


def training_base(settings: StageSettings, run: Run, state: CatalogState) -> Base:
    """The same to train adapters over: on the worker's device, in the recipe's numbers, which are no longer `auto`."""
    return published_base(settings.root, state, DTYPES[settings.recipe.dtype], run.workers.device)


def published_adapter(root: Root | Store, ref: AdapterRef, device: str | torch.device = "cpu") -> AdapterWeights:
    """The factors of one published version, in float32."""
    return unpack(pack(Store.of(root).adapter_folder(ref)), torch.float32, device)


def trained_router(root: Root | Store, state: CatalogState) -> TinyAda:
    """The current router as it was trained. Raises `StageOrder` when none has been published."""
    if state.router is None:
        raise StageOrder(f"{_named(root)} holds no router yet; run `zephyra router train`, or `zephyra train all`.")
    return TinyAda.load(Store.of(root).folder(f"router/{state.router}"))


def published_router(root: Root | Store, state: CatalogState) -> TinyAda:
    """The router as it is served: with the domains added since, without those withdrawn. Raises as `trained_router`."""
    router = RouterAssembly(Store.of(root)).assemble(state)
    return router if router is not None else trained_router(root, state)


def publish_for_base(catalog: Catalog, change: Change, base: int | None) -> CatalogState:
    """Publish what belongs to one version of the base. Raises `CatalogConflict` if that is no longer the current one.

    What others published meanwhile for the same base is kept.
    """
    while True:
        state = catalog.load()
        if state.base != base:
            raise CatalogConflict(f"The base is now version {state.base}, this was trained on {base}; train it again.")
        try:
            return catalog.publish(change, expected_generation=state.generation)
        except CatalogConflict:
            continue


def require_adapters(root: Root | Store, state: CatalogState) -> None:
    """Raise `StageOrder` when no adapter has been published."""
    if not state.adapters:
        raise StageOrder(f"{_named(root)} holds no adapters yet; run stage 'adapters' first.")


def _named(root: Root | Store) -> str:
    return "The root" if isinstance(root, Store) else str(root)
