"""What can be done to the domains of a root while it is served: list, show, add, withdraw, roll back, name.

Every wire calls these. Each checks all it can before it writes, and writes files before the catalog's generation.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cluster.errors import (
    CorruptArtifact,
    IncompatibleAdapter,
    InvalidAdapter,
    InvalidInput,
    StageOrder,
    UnknownDomain,
    ZephyraError,
)
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, CatalogState, Change, check_generation
from cluster.lora.foreign import MAX_CONFIG_BYTES, read_handed_in
from cluster.lora.packed_adapter import CONFIG_FILE, OURS_FILE, PackedAdapter, write_adapter
from cluster.lora.peft_format import unpack
from cluster.lora.weights import AdapterWeights, adaptable_layers
from cluster.messages import AdapterRef, check_domain_name
from cluster.model.base import fingerprint, load_base, skeleton
from cluster.router.assembly import RouterAssembly
from cluster.router.data_free import as_examples, words_of_adapter
from cluster.router.domain_prototypes import (
    MAX_PROTOTYPES_BYTES,
    PROTOTYPES_FILE,
    DomainPrototypes,
    prototypes_from_examples,
)
from cluster.router.examples import Examples, examples_beside
from cluster.training.artifacts import publish_for_base, trained_router
from cluster.training.domain_version import publish_version, write_version
from deployments.domains.info import DomainChange, DomainHistory, DomainInfo, DomainPage

_READERS = 16


class Domains:
    """The operations on one root. Not for the event loop: they read and write files, or ask a bucket."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._assembly = RouterAssembly(store)

    def all(self) -> list[DomainInfo]:
        """Every current domain, by name."""
        state = self._catalog.load()
        return self._infos(state, sorted(state.adapters))

    def page(self, limit: int, after: str = "") -> DomainPage:
        """At most `limit` of the current domains, those whose names come after `after`."""
        state = self._catalog.load()
        names = [name for name in sorted(state.adapters) if name > after]
        return DomainPage(tuple(self._infos(state, names[:limit])), state.generation, len(names) > limit)

    def show(self, name: str) -> DomainHistory:
        """One domain, or the one that an alias names. Raises `UnknownDomain`."""
        state = self._catalog.load()
        ref = state.ref(name)
        (info,) = self._infos(state, [ref.domain])
        files = {file: entry.num_bytes for file, entry in self._store.adapter_files(ref).items()}
        return DomainHistory(info, tuple(self._store.adapter_versions(ref.domain)), files, state.generation)

    def add(
        self,
        name: str,
        adapter: Path,
        examples: Examples | Sequence[str] = (),
        is_data_free: bool = False,
        expected_generation: int | None = None,
    ) -> DomainChange:
        """Publish the adapter in `adapter`, a folder that PEFT saved, as the next version of `name`.

        The router learns the domain from `examples`, and of their topics, if they have some; without any, from words of
        the adapter if `is_data_free`, else from the examples of the version before, if it has some. Raises the
        `ZephyraError` that says what is wrong with any of it, and then nothing has been published.
        """
        check_domain_name(name)
        given = Examples.of(examples)
        if given and is_data_free:
            raise InvalidInput(
                f"There are {len(given)} examples of {name!r}, so it is not data-free; give one of both."
            )
        state = self._catalog.load()
        check_generation(state, expected_generation)
        Change(adapters={name: 1}).check(state)
        base = self._base_folder(state)
        packed, weights = _read(adapter, base)
        if is_data_free:
            given = Examples.of(_words(base, weights))
        elif not given:
            given = self._examples_before(state, name)
        prototypes = self._prototypes(state, name, given, is_data_free) if given else None
        kept = {"added_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "num_examples": len(given)}

        def write(folder: Path) -> None:
            write_adapter(folder, packed.config_json, packed.base_fingerprint, packed.tensors.data, kept)

        change = write_version(self._store, name, write, prototypes, given)
        generation = publish_version(self._store, change, state.base, expected_generation).generation
        return DomainChange(name, change.adapters[name], generation)

    def remove(self, name: str, expected_generation: int | None = None) -> DomainChange:
        """Withdraw a domain: no new request gets it, those in flight end with it, and its files stay.

        Raises `UnknownDomain`.
        """
        after = self._catalog.publish(Change(withdrawn=(name,)), expected_generation)
        return DomainChange(name, None, after.generation)

    def rollback(self, name: str, version: int | None = None, expected_generation: int | None = None) -> DomainChange:
        """Make an earlier version current again, by default the newest before the current one.

        With its version given, a domain that was withdrawn comes back. Raises `UnknownDomain` when there is no such
        version, `IncompatibleAdapter` when it belongs to another base.
        """
        state = self._catalog.load()
        if version is not None and name in state.withdrawn:
            ref = AdapterRef(name, version)
        else:
            current = state.ref(name)
            ref = AdapterRef(current.domain, self._before(current) if version is None else version)
        files = self._store.adapter_files(ref)
        ours = json.loads((self._store.adapter_folder(ref) / OURS_FILE).read_text())
        if ours["base_fingerprint"] != (served := fingerprint(self._base_folder(state))):
            raise IncompatibleAdapter(f"{ref} was trained on base {ours['base_fingerprint']}, this is base {served}.")
        prototypes = {ref.domain: files[PROTOTYPES_FILE].sha256} if PROTOTYPES_FILE in files else {}
        change = Change(adapters={ref.domain: ref.version}, prototypes=prototypes)
        return DomainChange(ref.domain, ref.version, self._publish(change, state, expected_generation))

    def set_alias(self, alias: str, domain: str | None) -> CatalogState:
        """Let `alias` name a domain too, or nothing any more. Raises `InvalidInput` or `UnknownDomain`."""
        return self._catalog.publish(Change(aliases={alias: domain}))

    def set_tag(self, domain: str, tag: str, version: int | None) -> CatalogState:
        """Let `domain@tag` mean a version, or nothing any more. Raises `InvalidInput` or `UnknownDomain`."""
        if version is not None and not self._store.has_adapter(AdapterRef(domain, version)):
            raise UnknownDomain(f"There is no adapter {domain}@{version}; tag a version that was published.")
        return self._catalog.publish(Change(tags={domain: {tag: version}}))

    def _before(self, current: AdapterRef) -> int:
        earlier = [number for number in self._store.adapter_versions(current.domain) if number < current.version]
        if not earlier:
            raise UnknownDomain(f"There is no version of {current.domain!r} before {current.version}.")
        return earlier[-1]

    def _examples_before(self, state: CatalogState, name: str) -> Examples:
        """What the current version was added from: prompts belong to a domain, whichever adapter answers them."""
        if name not in state.prototypes:
            return Examples()
        ref = state.ref(name)
        rows = self._store.adapter_file(ref, PROTOTYPES_FILE, state.prototypes[name], MAX_PROTOTYPES_BYTES)
        # Words of an adapter belong to that adapter.
        if DomainPrototypes.from_bytes(rows).is_data_free:
            return Examples()
        return examples_beside(self._store, ref) or Examples()

    def _publish(self, change: Change, state: CatalogState, expected_generation: int | None) -> int:
        """The generation that holds the change."""
        if expected_generation is None:
            return publish_for_base(self._catalog, change, state.base).generation
        return self._catalog.publish(change, expected_generation).generation

    def _prototypes(self, state: CatalogState, name: str, examples: Examples, is_data_free: bool) -> DomainPrototypes:
        router = trained_router(self._store, state)
        assert state.router is not None
        return prototypes_from_examples(router, state.router, name, examples, is_data_free)

    def _base_folder(self, state: CatalogState) -> Path:
        if state.base is None:
            raise StageOrder(
                "The root holds no base yet; run `zephyra train base` first, with --base FOLDER for one that is there."
            )
        return self._store.folder(f"base/{state.base}")

    def _infos(self, state: CatalogState, names: Sequence[str]) -> list[DomainInfo]:
        router = self._assembly.assemble(state)
        rows = {} if router is None else dict(zip(router.domains, router.head.num_prototypes_D.tolist(), strict=True))
        guesses = frozenset() if router is None else router.data_free
        aliases: defaultdict[str, list[str]] = defaultdict(list)
        for alias, domain in sorted(state.aliases.items()):
            aliases[domain].append(alias)

        def info(name: str) -> DomainInfo:
            rank, num_bytes, problem = self._files(state.ref(name))
            tags = dict(sorted(state.tags.get(name, {}).items()))
            problem = self._assembly.problems.get(name, problem)
            return DomainInfo(
                name,
                state.adapters[name],
                rank,
                num_bytes,
                rows.get(name, 0),
                name in guesses,
                tags,
                tuple(aliases[name]),
                problem,
            )

        # From a bucket each takes its time.
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(info, names))

    def _files(self, ref: AdapterRef) -> tuple[int | None, int, str | None]:
        """Rank, bytes, and what is wrong with a version, without reading its factors."""
        try:
            files = self._store.adapter_files(ref)
            num_bytes = sum(file.num_bytes for file in files.values())
            file = CONFIG_FILE
            config = self._store.adapter_file(ref, file, files[file].sha256, MAX_CONFIG_BYTES)
            return int(json.loads(config)["r"]), num_bytes, None
        except (ZephyraError, ValueError, KeyError, TypeError) as error:
            return None, 0, str(error)


def _read(adapter: Path, base_folder: Path) -> tuple[PackedAdapter, AdapterWeights]:
    """The adapter that was handed in, checked against the base. Raises `InvalidAdapter` for damage: it is not ours."""
    try:
        packed = read_handed_in(adapter, fingerprint(base_folder))
        weights = unpack(packed, torch.float32)
    except CorruptArtifact as error:
        raise InvalidAdapter(str(error)) from error
    weights.check_fits(adaptable_layers(skeleton(base_folder)), packed.base_fingerprint)
    return packed, weights


def _words(base_folder: Path, weights: AdapterWeights) -> list[str]:
    base = load_base(base_folder)
    embeddings_TI = base.model.get_input_embeddings().weight
    assert isinstance(embeddings_TI, torch.Tensor)
    return as_examples(words_of_adapter(weights, embeddings_TI, base.tokenizer))
