"""A version of one domain with all that belongs to it: its adapter, what the router knows it by, and whence.

Written first, published after; what is not published is taken away again, so that nobody rolls back to it.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from cluster.errors import StorageUnavailable, ZephyraError
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, CatalogState, Change
from cluster.messages import AdapterRef
from cluster.router.domain_prototypes import PROTOTYPES_FILE, DomainPrototypes
from cluster.router.examples import EXAMPLES_FILE, Examples
from cluster.training.artifacts import publish_for_base


def write_version(
    store: Store,
    name: str,
    write_adapter: Callable[[Path], None],
    prototypes: DomainPrototypes | None,
    examples: Examples,
) -> Change:
    """Write the domain's next version, and return what is to be published: without `prototypes`, the adapter alone."""
    rows = None if prototypes is None else prototypes.to_bytes()

    def write(folder: Path) -> None:
        write_adapter(folder)
        if rows is not None:
            (folder / PROTOTYPES_FILE).write_bytes(rows)
            (folder / EXAMPLES_FILE).write_bytes(examples.to_bytes())

    version = store.write_version(f"adapters/{name}", write)
    named = {} if rows is None else {name: hashlib.sha256(rows).hexdigest()}
    return Change(adapters={name: version}, prototypes=named)


def publish_version(
    store: Store, change: Change, base: int | None, expected_generation: int | None = None
) -> CatalogState:
    """Make current what `write_version` wrote for this version of the base.

    Raises `CatalogConflict` if the base is another by now, or the generation is not the expected one.
    """
    catalog = Catalog(store)
    try:
        if expected_generation is None:
            return publish_for_base(catalog, change, base)
        return catalog.publish(change, expected_generation)
    except StorageUnavailable:
        # It may be published all the same.
        raise
    except ZephyraError:
        for name, version in change.adapters.items():
            store.discard_adapter(AdapterRef(name, version))
        raise
