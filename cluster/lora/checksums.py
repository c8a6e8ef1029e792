"""The checksums of a version: a file beside its files that says how long each is and what it hashes to.

It is written last, so that on a bucket a version is there when this file is. Knows nothing of what the files hold.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import CorruptArtifact, InvalidInput

CHECKSUMS = "checksums.json"
MAX_CHECKSUMS_BYTES = 2**20
MAX_VERSION_BYTES = 2**40

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileSum:
    """One file of a version."""

    num_bytes: int
    sha256: str


def check_name(name: str) -> str:
    """Return `name`, a path below the root, or raise `InvalidInput`: no "..", nothing hidden, nothing absolute."""
    if not all(_PART.fullmatch(part) for part in name.split("/")):
        raise InvalidInput(
            f"{name!r} cannot name an artifact: expected parts of letters, digits, '.', '_' and '-' between slashes, "
            "each starting with a letter, a digit or '_'."
        )
    return name


def sha256_of(file: Path) -> str:
    """The checksum of a file, read once."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Add the checksums to a folder that is complete otherwise. Raises `InvalidInput` for a link or a strange name."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        name = check_name(file.relative_to(folder).as_posix())
        if file.is_symlink():
            raise InvalidInput(f"{name!r} is a link; a version holds files only: copy what it points to.")
        if file.is_file():
            sums[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (folder / CHECKSUMS).write_text(json.dumps({"files": sums}, indent=2))


def parse_checksums(content: bytes, version: str) -> dict[str, FileSum]:
    """The files of `version` by name. Raises `CorruptArtifact` for anything that `write_checksums` does not write."""
    try:
        sums = {check_name(name): FileSum(f["bytes"], f["sha256"]) for name, f in json.loads(content)["files"].items()}
        if not all(
            type(s.num_bytes) is int and s.num_bytes >= 0 and _SHA256.fullmatch(s.sha256) for s in sums.values()
        ):
            raise ValueError("a length or a checksum is none")
        if sum(s.num_bytes for s in sums.values()) > MAX_VERSION_BYTES:
            raise ValueError(f"the files together exceed {MAX_VERSION_BYTES} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, InvalidInput, RecursionError) as error:
        raise CorruptArtifact(f"The checksums of {version} cannot be read ({error}); restore it.") from error
    return sums


def check_folder(
    folder: Path, version: str, is_hashed: Callable[[str], bool] = lambda _: True
) -> Mapping[str, FileSum]:
    """Raise `CorruptArtifact` unless `folder` holds the files of its checksums, as long as they were, and no link.

    Files that `is_hashed` says no to are left to whoever reads them: their length alone is compared.
    """
    if not (folder / CHECKSUMS).is_file():
        raise CorruptArtifact(f"{version} has no {CHECKSUMS}; restore it, or publish it again.")
    try:
        if (folder / CHECKSUMS).stat().st_size > MAX_CHECKSUMS_BYTES:
            raise CorruptArtifact(f"The checksums of {version} exceed {MAX_CHECKSUMS_BYTES} bytes; restore it.")
        sums = parse_checksums((folder / CHECKSUMS).read_bytes(), version)
        inside = folder.resolve()
        for name, expected in sums.items():
            file = folder / name
            if file.is_symlink() or not file.resolve().is_relative_to(inside):
                raise CorruptArtifact(f"{name} of {version} is a link; a version holds files only: restore it.")
            if file.stat().st_size != expected.num_bytes or (is_hashed(name) and sha256_of(file) != expected.sha256):
                raise CorruptArtifact(f"{name} of {version} is not what was published; restore it.")
    except OSError as error:
        # An OSError's own text names the path, which is nobody's business outside.
        raise CorruptArtifact(f"{version} cannot be read: {error.strerror}; restore it.") from error
    return sums
