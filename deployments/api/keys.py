"""API keys: the file that holds their hashes, how it is changed, and whose a key is while the system runs."""

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import InvalidInput, KeysUnavailable

logger = logging.getLogger("ray.serve")

PREFIX = "zk-"
"""By which people and scanners of source code tell that a text is a key of Zephyra's."""
KEY_BYTES = 32
MAX_FILE_BYTES = 2**20
CHECK_S = 0.5
"""A change of the file is seen within so long; a look at it costs one call to the kernel."""


class Role(StrEnum):
    """What the holder of a key may do."""

    INFER = "infer"
    """Ask, have prompts routed, look at models and domains, judge answers."""
    ADMIN = "admin"
    """The same, and change domains."""

    def allows(self, needed: "Role") -> bool:
        """Whether it is enough where `needed` is asked for."""
        return self is Role.ADMIN or needed is Role.INFER


def role_of(text: str) -> Role:
    """The role that a user named. Raises `InvalidInput` for one that is none."""
    try:
        return Role(text)
    except ValueError:
        raise InvalidInput(f"There is no role {text!r}; the roles are: {', '.join(Role)}.") from None


class KeyEntry(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Whose it is, or what for."""
    role: Role
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole key, prefix included."""


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[KeyEntry, ...]

    @model_validator(mode="after")
    def _each_is_there_once(self) -> Self:
        for what in ("name", "sha256"):
            seen: set[str] = set()
            for entry in self.keys:
                if (value := getattr(entry, what)) in seen:
                    raise ValueError(f"the {what} {value!r} is there twice")
                seen.add(value)
        return self


def read_keys(file: Path) -> tuple[KeyEntry, ...]:
    """The keys of a file. Raises `InvalidInput` for one that is missing, too large, or not as `zephyra keys` writes."""
    expected = "expected a file that `zephyra keys add` wrote"
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise InvalidInput(f"The keys file {str(file)!r} is no regular file; {expected}.")
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"The keys file {str(file)!r} cannot be read ({error.strerror}); {expected}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise InvalidInput(f"The keys file {str(file)!r} is larger than {MAX_FILE_BYTES} bytes; {expected}.")
    try:
        return _Content.model_validate_json(content).keys
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise InvalidInput(f"The keys file {str(file)!r} is wrong at {where}: {problem['msg']}; {expected}.") from None


def add_key(file: Path, name: str, role: Role) -> str:
    """A new key; the file keeps its hash alone. Raises `InvalidInput` for a name that is taken or cannot be."""
    key = f"{PREFIX}{secrets.token_urlsafe(KEY_BYTES)}"
    try:
        entry = KeyEntry(name=name, role=role, sha256=_digest(key).hex())
    except ValidationError:
        raise InvalidInput(
            f"{name!r} is no name for a key; expected 1 to 64 letters, digits, dots, dashes and underscores."
        ) from None
    with _changing(file) as (entries, write):
        if any(other.name == name for other in entries):
            raise InvalidInput(f"There is a key {name!r} already; choose another name, or remove that one first.")
        write((*entries, entry))
    return key


def remove_key(file: Path, name: str) -> None:
    """Take a key away. Raises `InvalidInput` when there is none of that name."""
    with _changing(file) as (entries, write):
        left = tuple(entry for entry in entries if entry.name != name)
        if len(left) == len(entries):
            known = ", ".join(entry.name for entry in entries) or "none"
            raise InvalidInput(f"There is no key {name!r} in {str(file)!r}; the keys are: {known}.")
        write(left)


_Write = Callable[[tuple[KeyEntry, ...]], None]


@contextmanager
def _changing(file: Path) -> Iterator[tuple[tuple[KeyEntry, ...], _Write]]:
    """The keys of a file, none if it is not there, and what replaces them. One change waits for another."""
    # What a link names is replaced, not the link.
    file = file.resolve()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InvalidInput(f"{str(file.parent)!r} cannot be opened ({error.strerror}); name another file.") from error

    def write(entries: tuple[KeyEntry, ...]) -> None:
        content = _Content(keys=entries).model_dump_json(indent=2).encode() + b"\n"
        if len(content) > MAX_FILE_BYTES:
            raise InvalidInput(f"{str(file)!r} would be larger than {MAX_FILE_BYTES} bytes; remove keys first.")
        try:
            _replace(file, content)
            os.fsync(folder)
        except OSError as error:
            raise InvalidInput(f"{str(file)!r} cannot be written ({error.strerror}); name another file.") from error

    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield (read_keys(file) if file.exists() else ()), write
    finally:
        os.close(folder)


def _replace(file: Path, content: bytes) -> None:
    """Readers see the old content or the new; only the owner may read it."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


class Keys:
    """Those of a file, read again when it changes, so that a key is let in or refused within `CHECK_S`.

    `clock` gives seconds.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._entries: list[tuple[bytes, KeyEntry]] | None = None
        self._stamp: tuple[int, ...] | None = None
        self._problem = ""
        self._check_at_s = clock()

    def owner(self, key: str) -> KeyEntry | None:
        """The entry of `key`, or None. Raises `KeysUnavailable` while the file cannot be read."""
        self._follow()
        if self._entries is None:
            raise KeysUnavailable("The keys cannot be read at present; tell who runs this server, and try again.")
        given, found = _digest(key), None
        # All of them, wherever one fits: the time that this takes must not tell.
        for digest, entry in self._entries:
            if hmac.compare_digest(digest, given):
                found = entry
        return found

    def _follow(self) -> None:
        now_s = self._clock()
        if now_s < self._check_at_s:
            return
        self._check_at_s = now_s + CHECK_S
        # Before the content, so that a change meanwhile is seen the next time.
        stamp = _stamp(self._file)
        if stamp is not None and stamp == self._stamp:
            return
        try:
            entries = read_keys(self._file)
        except InvalidInput as error:
            # Somebody may have taken the file away to lock everybody out: what it held does not count any more.
            self._entries, self._stamp = None, None
            if str(error) != self._problem:
                logger.error("%s Nobody is let in until it can be read.", error)
            self._problem = str(error)
        else:
            self._entries, self._stamp, self._problem = [(bytes.fromhex(e.sha256), e) for e in entries], stamp, ""


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Differs when the file is another or was written; None when it is not there."""
    try:
        seen = file.stat()
    except OSError:
        return None
    return (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
