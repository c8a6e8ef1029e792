"""The router that the catalog asks for: the trained artifact, and the prototypes of each domain beside its adapter.

A name that the catalog does not hold, as a domain or an alias, has no rows. A domain with prototypes of its own has
those; one without has the rows it was trained with. Prototypes made with another version of the router give way to rows
trained into this one; where there are none, they are made again from the domain's stored examples.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import CorruptArtifact, StorageUnavailable, ZephyraError
from cluster.lora.artifacts import Store
from cluster.lora.catalog_state import CatalogState
from cluster.messages import AdapterRef
from cluster.router.domain_prototypes import (
    MAX_PROTOTYPES_BYTES,
    PROTOTYPES_FILE,
    DomainPrototypes,
    prototypes_from_examples,
    prototypes_of,
    with_prototypes,
)
from cluster.router.examples import examples_beside
from cluster.router.tiny_ada import TinyAda

_READERS = 16

_Own = tuple[int, str]
"""A domain's version and the checksum of its prototypes."""


class RouterAssembly:
    """Makes the router of a state out of the one it made before: only what changed is read and made anew."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._version: int | None = None
        self._trained: TinyAda | None = None
        self._last: TinyAda | None = None
        self._rows_of: dict[str, _Own | None] = {}
        """Where the last router's domains have their rows from; None where they were trained into it."""
        self.problems: Mapping[str, str] = {}
        """Domains that had to be left out of the last router, each with the reason."""

    def assemble(self, state: CatalogState) -> TinyAda | None:
        """The router of `state`, None while none is published. Raises `CorruptArtifact` if the trained one is damaged,
        `StorageUnavailable` if a bucket does not answer.

        A domain whose own files are damaged is left out, and the others are routed.
        """
        if state.router is None:
            return None
        if state.router != self._version or self._trained is None or self._last is None:
            self._trained = self._last = TinyAda.load(self._store.folder(f"router/{state.router}"))
            self._version, self._rows_of = state.router, dict.fromkeys(self._trained.domains)
        # A name that was trained and is an alias now is still recognised: another domain's adapter answers for it.
        served = state.adapters.keys() | state.aliases.keys()
        wanted: dict[str, _Own | None] = {name: None for name in self._trained.domains if name in served}
        wanted |= {name: (state.adapters[name], sha256) for name, sha256 in state.prototypes.items()}
        before, missing = self._rows_of, object()
        changed = [name for name, own in wanted.items() if before.get(name, missing) != own]
        added, problems = self._added({name: wanted[name] for name in changed})
        removed = (before.keys() - wanted.keys()) | problems.keys()
        if added or removed:
            self._last = with_prototypes(self._last, added, removed)
        self._rows_of = {name: own for name, own in wanted.items() if name not in problems}
        self.problems = problems
        return self._last

    def _added(self, wanted: Mapping[str, _Own | None]) -> tuple[dict[str, DomainPrototypes], dict[str, str]]:
        """The rows of each of these domains, or what is wrong with its files."""
        added, problems = {}, {}
        # From a bucket each takes its time.
        with ThreadPoolExecutor(_READERS) as pool:
            for name, found in zip(wanted, pool.map(self._try, wanted, wanted.values()), strict=True):
                if isinstance(found, ZephyraError):
                    problems[name] = str(found)
                else:
                    added[name] = found
        return added, problems

    def _try(self, name: str, own: _Own | None) -> DomainPrototypes | ZephyraError:
        try:
            return self._prototypes(name, own)
        except StorageUnavailable:
            # No domain's fault, and over in a while.
            raise
        except ZephyraError as error:
            return error

    def _prototypes(self, name: str, own: _Own | None) -> DomainPrototypes:
        """The rows to use for a domain: those trained into the router where they are the newer ones."""
        assert self._trained is not None
        assert self._version is not None
        if own is None:
            return prototypes_of(self._trained, name, self._version)
        version, sha256 = own
        ref = AdapterRef(name, version)
        content = self._store.adapter_file(ref, PROTOTYPES_FILE, sha256, MAX_PROTOTYPES_BYTES)
        given = DomainPrototypes.from_bytes(content)
        if given.router == self._version:
            return given
        if name in self._trained.domains:
            return prototypes_of(self._trained, name, self._version)
        if (examples := examples_beside(self._store, ref)) is None:
            raise CorruptArtifact(
                f"{ref} has prototypes and no examples to make them again from; add the domain again."
            )
        return prototypes_from_examples(self._trained, self._version, name, examples, given.is_data_free)
