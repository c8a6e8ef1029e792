"""What a stage needs from the stages before: the published base, adapters and router of a root."""

from pathlib import Path

import torch

from cluster.errors import CatalogConflict, StageOrder
from cluster.lora.catalog import Catalog, CatalogState, Change
from cluster.lora.packed_adapter import pack
from cluster.lora.peft_format import unpack
from cluster.lora.weights import AdapterWeights
from cluster.messages import AdapterRef
from cluster.model.base import Base, load_base
from cluster.router.tiny_ada import TinyAda


def published_base(root: Path, state: CatalogState) -> Base:
    """The current base. Raises `StageOrder` when none has been published."""
    if state.base is None:
        raise StageOrder(f"{root} holds no base yet; run stage 'base' first, or `zephyra train all`.")
    return load_base(root / "base" / str(state.base))


def published_adapter(root: Path, ref: AdapterRef) -> AdapterWeights:
    """The factors of one published version, in float32."""
    return unpack(pack(root / "adapters" / ref.domain / str(ref.version)), torch.float32)


def published_router(root: Path, state: CatalogState) -> TinyAda:
    """The current router. Raises `StageOrder` when none has been published."""
    if state.router is None:
        raise StageOrder(f"{root} holds no router yet; run `zephyra router train`, or `zephyra train all`.")
    return TinyAda.load(root / "router" / str(state.router))


def publish_for_base(catalog: Catalog, change: Change, base: int | None) -> None:
    """Publish what belongs to one version of the base. Raises `CatalogConflict` if that is no longer the current one.

    What others published meanwhile for the same base is kept.
    """
    while True:
        state = catalog.load()
        if state.base != base:
            raise CatalogConflict(f"The base is now version {state.base}, this was trained on {base}; train it again.")
        try:
            catalog.publish(change, expected_generation=state.generation)
        except CatalogConflict:
            continue
        return


def require_adapters(root: Path, state: CatalogState) -> None:
    """Raise `StageOrder` when no adapter has been published."""
    if not state.adapters:
        raise StageOrder(f"{root} holds no adapters yet; run stage 'adapters' first.")
