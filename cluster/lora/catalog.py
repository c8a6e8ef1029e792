"""The catalog: which base, domains and router are current. The one source of truth, durable and never overwritten.

`catalog/<number>.json` is a generation: it holds what changed since the one before, and every 32nd the whole state,
so that reading takes at most 32 files however many domains there are. A generation is created only if absent
(`os.link` fails on an existing name, also between machines on a shared file system): of two publishers one wins,
the other starts again from what the winner left.
"""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.errors import CatalogConflict, CorruptArtifact, UnknownDomain
from cluster.lora.store import sync
from cluster.messages import AdapterRef, check_domain_name

_SNAPSHOT_EVERY = 32
_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class CatalogState:
    """What was current at one generation; generation 0 is the empty catalog."""

    generation: int = 0
    base: int | None = None
    """Version of the base, the folder `base/<version>`."""
    adapters: Mapping[str, int] = field(default_factory=dict)
    """Domain to the version of its adapter, the folder `adapters/<domain>/<version>`."""
    router: int | None = None
    """Version of the router, the folder `router/<version>`."""

    def ref(self, domain: str) -> AdapterRef:
        """The current adapter of `domain`. Raises `UnknownDomain`."""
        if domain not in self.adapters:
            known = ", ".join(sorted(self.adapters)) or "none yet"
            raise UnknownDomain(f"There is no domain {domain!r}; the domains are: {known}.")
        return AdapterRef(domain, self.adapters[domain])


@dataclass(frozen=True, slots=True)
class Change:
    """What one generation changes."""

    base: int | None = None
    adapters: Mapping[str, int] = field(default_factory=dict)
    withdrawn: tuple[str, ...] = ()
    router: int | None = None

    def apply(self, state: CatalogState) -> CatalogState:
        """The state after this change; a new base withdraws the adapters and the router, which belong to the old."""
        if self.base is not None:
            state = replace(state, base=self.base, adapters={}, router=None)
        kept = {name: version for name, version in state.adapters.items() if name not in self.withdrawn}
        return replace(
            state,
            generation=state.generation + 1,
            adapters={**kept, **self.adapters},
            router=self.router if self.router is not None else state.router,
        )


class Catalog:
    """The generations below `root/catalog`. Cheap to make; holds no state but the path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = root / "catalog"

    def latest(self) -> int:
        """Number of the newest generation, 0 when there is none. One listing of a folder."""
        if not self._folder.is_dir():
            return 0
        return max((int(f.stem) for f in self._folder.glob("*.json") if f.stem.isdecimal()), default=0)

    def load(self) -> CatalogState:
        """The current state. Raises `CorruptArtifact` when a generation cannot be read."""
        newest = self.latest()
        changes: list[Change] = []
        for number in range(newest, 0, -1):
            change, snapshot = self._read(number)
            if snapshot is not None:
                state = snapshot
                break
            changes.append(change)
        else:
            state = CatalogState()
        for change in reversed(changes):
            state = change.apply(state)
        return state

    def publish(self, change: Change, expected_generation: int | None = None) -> CatalogState:
        """Make `change` the next generation and return the state after it.

        With `expected_generation` it raises `CatalogConflict` if the catalog has moved on; without, it is applied to
        whatever is current. The artifacts it names must have been written before.
        """
        for domain in change.adapters:
            check_domain_name(domain)
        for _ in range(_ATTEMPTS):
            state = self.load()
            if expected_generation is not None and state.generation != expected_generation:
                raise CatalogConflict(
                    f"The catalog is at generation {state.generation}, not {expected_generation}; "
                    "look at what changed and publish again."
                )
            for domain in change.withdrawn:
                state.ref(domain)
            after = change.apply(state)
            if self._create(after, change):
                return after
        raise CatalogConflict(f"Others published {_ATTEMPTS} times while this publish was tried; try again.")

    def _read(self, number: int) -> tuple[Change, CatalogState | None]:
        """What a generation changed, and the whole state where it holds one."""
        try:
            content = json.loads((self._folder / f"{number}.json").read_text())
            change = Change(**{**content["change"], "withdrawn": tuple(content["change"]["withdrawn"])})
            return change, CatalogState(generation=number, **content["state"]) if "state" in content else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            # An OSError's own text names the path, which is nobody's business outside.
            why = error.strerror if isinstance(error, OSError) else error
            raise CorruptArtifact(
                f"Generation {number} of the catalog cannot be read: {why}; restore the file from a copy."
            ) from error

    def _create(self, after: CatalogState, change: Change) -> bool:
        content: dict[str, Any] = {
            "change": {
                "base": change.base,
                "adapters": dict(change.adapters),
                "withdrawn": list(change.withdrawn),
                "router": change.router,
            }
        }
        if after.generation % _SNAPSHOT_EVERY == 0:
            content["state"] = {"base": after.base, "adapters": dict(after.adapters), "router": after.router}
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f".draft-{uuid.uuid4().hex}"
        with draft.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, self._folder / f"{after.generation}.json")
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        sync(self._folder)
        return True


class CatalogWatcher:
    """The state as of the last poll; calls `on_change` when a new generation has appeared."""

    def __init__(self, catalog: Catalog, on_change: Callable[[CatalogState], None] | None = None) -> None:
        self._catalog = catalog
        self._on_change = on_change
        self.state = catalog.load()

    def poll(self) -> CatalogState:
        """Look once; meant to be called every 250 ms. Costs one listing when nothing changed."""
        if self._catalog.latest() != self.state.generation:
            self.state = self._catalog.load()
            if self._on_change is not None:
                self._on_change(self.state)
        return self.state
