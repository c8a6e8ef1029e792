"""The artifacts of a root by what they are: versions by number, adapters by ref, each checked before it is used."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.config.places import Root
from cluster.errors import CorruptArtifact, UnknownDomain
from cluster.lora.checksums import CHECKSUMS, MAX_CHECKSUMS_BYTES, FileSum, check_folder, parse_checksums
from cluster.lora.store import Storage, open_storage
from cluster.messages import AdapterRef

_WEIGHTS = ".safetensors"


class Store:
    """The artifacts below `root`, a folder or the URI of a bucket. Cheap to make."""

    def __init__(self, root: Root | Storage) -> None:
        self.storage: Storage = open_storage(root) if isinstance(root, Path | str) else root
        self._checked: set[str] = set()

    @classmethod
    def of(cls, root: "Root | Store") -> "Store":
        """The store of a root, or the one that is given."""
        return root if isinstance(root, Store) else cls(root)

    def folder(self, name: str) -> Path:
        """The local folder of a version such as `base/3`, its checksums compared once in each process.

        On a bucket it is fetched on first use. Raises `CorruptArtifact` when it is missing or damaged.
        """
        try:
            folder = self.storage.folder(name)
        except FileNotFoundError:
            raise CorruptArtifact(f"There is no {name} in the root; restore it, or publish it again.") from None
        return self._checked_folder(name, folder, lambda _: True)

    def adapter_folder(self, ref: AdapterRef) -> Path:
        """The local folder of an adapter; on a bucket it is fetched on first use.

        All of it is checked but the factors' checksum, which `pack` compares as it reads them. Raises `UnknownDomain`
        when there is no such version, `CorruptArtifact` when it is damaged.
        """
        name = adapter_name(ref)
        try:
            folder = self.storage.folder(name)
        except FileNotFoundError:
            raise UnknownDomain(f"There is no adapter {ref}; ask for a version that was published.") from None
        return self._checked_folder(name, folder, lambda file: not file.endswith(_WEIGHTS))

    def _checked_folder(self, name: str, folder: Path, is_hashed: Callable[[str], bool]) -> Path:
        if name not in self._checked:
            try:
                check_folder(folder, name, is_hashed)
            except CorruptArtifact:
                # A copy of what a bucket holds can be had again.
                folder = self.storage.fetched_again(name)
                check_folder(folder, name, is_hashed)
            self._checked.add(name)
        return folder

    def has_adapter(self, ref: AdapterRef) -> bool:
        """Whether this version was ever written, all of it."""
        return self.storage.exists(f"{adapter_name(ref)}/{CHECKSUMS}")

    def adapter_versions(self, domain: str) -> list[int]:
        """The versions of a domain that were ever written, the oldest first; some may not have been published."""
        numbers = (int(name) for name in self.storage.names(f"adapters/{domain}") if name.isdecimal())
        return [number for number in sorted(numbers) if self.has_adapter(AdapterRef(domain, number))]

    def adapter_files(self, ref: AdapterRef) -> Mapping[str, FileSum]:
        """The files of an adapter by name, without reading them. Raises `UnknownDomain`, `CorruptArtifact`."""
        try:
            content = self.storage.read(f"{adapter_name(ref)}/{CHECKSUMS}", MAX_CHECKSUMS_BYTES)
        except FileNotFoundError:
            raise UnknownDomain(f"There is no adapter {ref}; ask for a version that was published.") from None
        return parse_checksums(content, adapter_name(ref))

    def adapter_file(self, ref: AdapterRef, file: str, sha256: str, max_bytes: int) -> bytes:
        """One file of an adapter, without the others. Raises `CorruptArtifact` if it is not what was published."""
        try:
            content = self.storage.read(f"{adapter_name(ref)}/{file}", max_bytes)
        except OSError as error:
            raise CorruptArtifact(f"{file} of {ref} cannot be read: {error.strerror}; restore it.") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CorruptArtifact(f"{file} of {ref} is not what was published; restore it.")
        return content

    def write_version(self, parent: str, write: Callable[[Path], None]) -> int:
        """Have `write` fill a new folder and publish it below `parent`; the number it got. Complete or absent."""
        return self.storage.write_version(parent, write)

    def discard_adapter(self, ref: AdapterRef) -> None:
        """Make a version that never was published one that was never written: nobody can roll back to it."""
        self.storage.discard_version(adapter_name(ref))


def adapter_name(ref: AdapterRef) -> str:
    """Where an adapter lies below the root."""
    return f"adapters/{ref.domain}/{ref.version}"
