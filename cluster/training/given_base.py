"""A base that is there already, taken over into a root as `base/<version>`: what stage 1 does instead of training one.

A copy, so that the root is whole wherever it goes: adapters mean nothing without the weights they were trained on.
"""

from collections.abc import Callable
from pathlib import Path

from cluster.config.places import Root
from cluster.errors import InvalidInput
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, Change
from cluster.lora.checksums import CHECKSUMS
from cluster.model.base import copy_base, fingerprint
from cluster.model.hub import find_base
from cluster.model.quantized_artifact import is_quantized
from cluster.model.servable import check_servable


def take_over_base(
    root: Root | Store, named: str, say: Callable[[str], None], max_context_tokens: int | None = None
) -> None:
    """Copy the base that `named` names, a folder or an id on the hub, into `root` and publish it.

    Nothing happens if it is the root's base already; another base withdraws the adapters and the router of the one
    before. Raises `NotTrained` when there is none, `InvalidInput` for one that cannot be served up to
    `max_context_tokens`, by default all that it was made for, or a root that cannot be written.
    """
    folder = find_base(named)
    check_servable(folder, max_context_tokens)
    if is_quantized(folder):
        raise InvalidInput(f"The base {named!r} is quantized, and adapters are trained on floats; name its float base.")
    store = Store.of(root)
    catalog = Catalog(store)
    state, mark = catalog.load(), fingerprint(folder)
    if state.base is not None and fingerprint(store.folder(f"base/{state.base}")) == mark:
        say(f"{named} ({mark}) is the root's base already, version {state.base}")
        return
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    say(f"taking over {named}: copying {num_bytes / 1e6:,.1f} MB of weights")

    def write(draft: Path) -> None:
        copy_base(folder, draft)
        # Of another root's base: they are written anew.
        (draft / CHECKSUMS).unlink(missing_ok=True)

    try:
        version = store.write_version("base", write)
    except OSError as error:
        raise InvalidInput(
            f"The root cannot take a copy of {named!r} ({error.strerror}); name one that can be written and has "
            "the space."
        ) from error
    catalog.publish(Change(base=version))
    say(f"published base {version} ({mark})")
