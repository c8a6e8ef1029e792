"""The catalog: which base, domains and router are current. The one source of truth, durable and never overwritten.

`catalog/<number>.json` is a generation: it holds what changed since the one before, and every 32nd the whole state,
so that reading takes at most 32 files however many domains there are. A generation is created only if absent: of two
publishers one wins, the other starts again from what the winner left.
"""

import hashlib
import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.config.places import Root
from cluster.errors import CatalogConflict, CorruptArtifact
from cluster.lora.artifacts import Store
from cluster.lora.catalog_state import CatalogState, Change

__all__ = ["Catalog", "CatalogState", "CatalogWatcher", "Change", "check_generation"]

_SNAPSHOT_EVERY = 32
_ATTEMPTS = 100
_FOLDER = "catalog"
_MAX_GENERATION_BYTES = 2**30
_READERS = 8


class Catalog:
    """The generations below `root/catalog`. Cheap to make; remembers what it read last, so that the next look is."""

    def __init__(self, root: Root | Store) -> None:
        self.store = Store.of(root)
        self._storage = self.store.storage
        self._last: CatalogState | None = None

    def latest(self) -> int:
        """Number of the newest generation, 0 when there is none.

        One listing the first time. After that it asks whether the next one is there: one small request, however long
        the history; more only when it is, since generations have no gaps.
        """
        if self._last is None:
            stems = (name.removesuffix(".json") for name in self._storage.names(_FOLDER) if name.endswith(".json"))
            return max((int(stem) for stem in stems if stem.isdecimal()), default=0)
        known, step = self._last.generation, 1
        while self._storage.exists(_name(known + step)):
            known, step = known + step, step * 2
        while step > 1:
            step //= 2
            if self._storage.exists(_name(known + step)):
                known += step
        return known

    def load(self) -> CatalogState:
        """The current state; reads what is new since the last look. Raises `CorruptArtifact` if that is damaged."""
        newest = self.latest()
        state = self._last if self._last is not None else CatalogState()
        if newest != state.generation:
            for change, snapshot in self._read_back(newest, state.generation):
                state = snapshot if snapshot is not None else change.apply(state)
        self._last = state
        return state

    def publish(self, change: Change, expected_generation: int | None = None) -> CatalogState:
        """Make `change` the next generation and return the state after it.

        With `expected_generation` it raises `CatalogConflict` if the catalog has moved on; without, it is applied to
        whatever is current. Raises `InvalidInput` or `UnknownDomain` for a change that cannot be applied to that. The
        artifacts it names must have been written before.
        """
        for _ in range(_ATTEMPTS):
            state = self.load()
            check_generation(state, expected_generation)
            change.check(state)
            after = change.apply(state)
            if self._create(after, change):
                self._last = after
                return after
        raise CatalogConflict(f"Others published {_ATTEMPTS} times while this publish was tried; try again.")

    def _read_back(self, newest: int, known: int) -> list[tuple[Change, CatalogState | None]]:
        """The generations after `known` that the newest state is made of, the oldest first: none before a snapshot."""
        start = max(known, newest - newest % _SNAPSHOT_EVERY - 1, 0)
        numbers = range(start + 1, newest + 1)
        if len(numbers) == 1:
            return [self._read(newest)]
        # From a bucket each takes its time.
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self._read, numbers))

    def _read(self, number: int) -> tuple[Change, CatalogState | None]:
        """What a generation changed, and the whole state where it holds one."""
        try:
            content = json.loads(self._storage.read(_name(number), _MAX_GENERATION_BYTES))
            if content.pop("sha256") != _sha256(content):
                raise ValueError("it is not what was published")
            change = Change(**{**content["change"], "withdrawn": tuple(content["change"]["withdrawn"])})
            return change, CatalogState(generation=number, **content["state"]) if "state" in content else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # An OSError's own text names the path, which is nobody's business outside.
            why = error.strerror if isinstance(error, OSError) else error
            raise CorruptArtifact(
                f"Generation {number} of the catalog cannot be read: {why}; restore the file from a copy."
            ) from error

    def _create(self, after: CatalogState, change: Change) -> bool:
        # The id makes each writer's content its own: a bucket may ask whether what is there is what was sent.
        content: dict[str, Any] = {"id": uuid.uuid4().hex, "change": change.as_json()}
        if after.generation % _SNAPSHOT_EVERY == 0:
            content["state"] = after.as_json()
        content["sha256"] = _sha256(content)
        return self._storage.create(_name(after.generation), json.dumps(content).encode())


def check_generation(state: CatalogState, expected: int | None) -> None:
    """Raise `CatalogConflict` if the catalog has moved on from the generation `expected`; None for any."""
    if expected is not None and state.generation != expected:
        raise CatalogConflict(
            f"The catalog is at generation {state.generation}, not {expected}; look at what changed and publish again."
        )


def _name(number: int) -> str:
    return f"{_FOLDER}/{number}.json"


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class CatalogWatcher:
    """The state as of the last poll; calls `on_change` when a new generation has appeared."""

    def __init__(self, catalog: Catalog, on_change: Callable[[CatalogState], None] | None = None) -> None:
        self._catalog = catalog
        self._on_change = on_change
        self.state = catalog.load()

    def poll(self) -> CatalogState:
        """Look once; meant to be called every 250 ms. Costs one question when nothing changed."""
        state = self._catalog.load()
        if state is not self.state:
            self.state = state
            if self._on_change is not None:
                self._on_change(self.state)
        return self.state
