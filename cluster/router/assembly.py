"""The router that the catalog asks for: the trained artifact, and the prototypes of each domain beside its adapter.

A domain that is not in the catalog has no rows. One with prototypes of its own has those; one without has the rows it
was trained with. Prototypes made with another version of the router give way to rows trained into this one; where there
are none, they are made again from the domain's stored examples.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import StorageUnavailable, ZephyraError
from cluster.lora.artifacts import Store
from cluster.lora.catalog_state import CatalogState
from cluster.messages import AdapterRef
from cluster.router.domain_prototypes import (
    EXAMPLES_FILE,
    MAX_EXAMPLES_BYTES,
    MAX_PROTOTYPES_BYTES,
    PROTOTYPES_FILE,
    DomainPrototypes,
    examples_from_bytes,
    prototypes_from_examples,
    with_prototypes,
)
from cluster.router.tiny_ada import TinyAda

_READERS = 16

_Key = tuple[AdapterRef, str]
"""A domain's version and the checksum of its prototypes."""


class RouterAssembly:
    """Makes the router of a state, and the next one from what it read for the one before."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._version: int | None = None
        self._trained: TinyAda | None = None
        self._read: dict[_Key, DomainPrototypes | None] = {}
        self.problems: Mapping[str, str] = {}
        """Domains that had to be left out of the last router, each with the reason."""

    def assemble(self, state: CatalogState) -> TinyAda | None:
        """The router of `state`, None while none is published. Raises `CorruptArtifact` if the trained one is damaged,
        `StorageUnavailable` if a bucket does not answer.

        A domain whose own files are damaged is left out, and the others are routed.
        """
        if state.router is None:
            return None
        if state.router != self._version or self._trained is None:
            self._trained = TinyAda.load(self._store.folder(f"router/{state.router}"))
            self._version, self._read = state.router, {}
        keys = {name: (state.ref(name), sha256) for name, sha256 in state.prototypes.items()}
        missing = [key for key in keys.values() if key not in self._read]
        problems = {}
        # From a bucket each takes its time.
        with ThreadPoolExecutor(_READERS) as pool:
            for key, found in zip(missing, pool.map(self._try, missing), strict=True):
                if isinstance(found, ZephyraError):
                    problems[key[0].domain] = str(found)
                else:
                    self._read[key] = found
        self._read = {key: self._read[key] for key in keys.values() if key in self._read}
        self.problems = problems
        added = {key[0].domain: given for key, given in self._read.items() if given is not None}
        unknown = set(self._trained.domains) - set(state.adapters)
        return with_prototypes(self._trained, added, unknown | set(problems))

    def _try(self, key: _Key) -> DomainPrototypes | ZephyraError | None:
        try:
            return self._prototypes(*key)
        except StorageUnavailable:
            # No domain's fault, and over in a while.
            raise
        except ZephyraError as error:
            return error

    def _prototypes(self, ref: AdapterRef, sha256: str) -> DomainPrototypes | None:
        """The rows to use for a domain, None where those trained into the router are the newer ones."""
        assert self._trained is not None
        assert self._version is not None
        content = self._store.adapter_file(ref, PROTOTYPES_FILE, sha256, MAX_PROTOTYPES_BYTES)
        given = DomainPrototypes.from_bytes(content)
        if given.router == self._version:
            return given
        if ref.domain in self._trained.domains:
            return None
        listed = self._store.adapter_files(ref)[EXAMPLES_FILE]
        kept = self._store.adapter_file(ref, EXAMPLES_FILE, listed.sha256, MAX_EXAMPLES_BYTES)
        examples = examples_from_bytes(kept)
        return prototypes_from_examples(self._trained, self._version, ref.domain, examples, given.is_data_free)
