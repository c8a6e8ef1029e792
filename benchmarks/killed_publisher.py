"""A publisher killed (kill -9) at each of its steps on the disk, over and over: what readers then find.

The steps are found, not listed: an audit hook sees every file that Python opens, links, renames, makes or removes. Each
publisher is a fork, so that hundreds of them die in a minute.
"""

import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

from benchmarks.figures import Measurement, Measurements
from cluster.errors import CorruptArtifact
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, CatalogState, Change
from cluster.messages import AdapterRef

_STEPS = ("open", "os.link", "os.mkdir", "os.rename", "os.remove", "os.scandir", "os.listdir")

_SNAPSHOT_NEXT = 31
"""Generations after which the next one holds the whole state."""

_IN_MEMORY = next((str(folder) for folder in [Path("/dev/shm")] if folder.is_dir()), None)
"""Where syncing costs nothing: a killed process, unlike a lost machine, takes no written byte along."""

WEIGHTS, PROTOTYPES = "weights", "prototypes"


@dataclass(slots=True)
class Kills:
    """What was found after so many kills."""

    old: int = 0
    new: int = 0
    torn: int = 0

    @property
    def count(self) -> int:
        """Of all."""
        return self.old + self.new + self.torn


def publish_law(root: Path) -> CatalogState:
    """Write the next version of a domain, with prototypes, and publish it."""
    store = Store(root)
    content = f"{WEIGHTS} of {len(store.adapter_versions('law')) + 1}"

    def write(folder: Path) -> None:
        for file in (WEIGHTS, PROTOTYPES):
            (folder / file).write_text(content)

    version = store.write_version("adapters/law", write)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return Catalog(store).publish(Change(adapters={"law": version}, prototypes={"law": sha256}))


def prepare(root: Path, num_generations: int) -> None:
    """A root that holds the domain, after so many generations."""
    version = publish_law(root).adapters["law"]
    for number in range(1, num_generations):
        Catalog(root).publish(Change(tags={"law": {f"tag{number}": version}}))


def withdraw_law(root: Path) -> CatalogState:
    """Take the domain back."""
    return Catalog(root).publish(Change(withdrawn=("law",)))


def killed_at(root: Path, step: int, publish: Callable[[Path], CatalogState]) -> bool:
    """Publish in a process of its own that is killed before its step `step`; False if it ended before that."""
    child = os.fork()
    if child == 0:
        left = step

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in _STEPS and str(arguments[0]).startswith(str(root)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            publish(root)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def kill_at_each_step(root: Path, publish: Callable[[Path], CatalogState], kills: Kills) -> None:
    """Publish on a copy of `root`, killed before the first step; on another, before the second; until it ends.

    After each kill the next publisher goes on from what is left.
    """
    before, step, is_killed = Catalog(root).load(), 1, True
    while is_killed:
        with tempfile.TemporaryDirectory(dir=_IN_MEMORY) as folder:
            copy = shutil.copytree(root, Path(folder) / "root")
            if is_killed := killed_at(copy, step, publish):
                after = _found(copy, before, publish)
                if after is None or not _goes_on(copy, after):
                    kills.torn += 1
                elif after == before:
                    kills.old += 1
                else:
                    kills.new += 1
        step += 1


def _goes_on(root: Path, before: CatalogState) -> bool:
    after = publish_law(root)
    return _found(root, before, publish_law) == after != before


def _found(root: Path, before: CatalogState, publish: Callable[[Path], CatalogState]) -> CatalogState | None:
    """The state that a reader finds, None unless it is the one before or the one after, with all its files."""
    try:
        after = Catalog(root).load()
        if (version := after.adapters.get("law")) is not None:
            folder = Store(root).folder(f"adapters/law/{version}")
            Store(root).adapter_file(AdapterRef("law", version), PROTOTYPES, after.prototypes["law"], 2**10)
            if (folder / WEIGHTS).read_text() != (folder / PROTOTYPES).read_text():
                return None
    except CorruptArtifact:
        return None
    if publish is withdraw_law:
        change = Change(withdrawn=("law",))
    else:
        change = Change(adapters={"law": version or 0}, prototypes={"law": after.prototypes.get("law", "")})
    return after if after in (before, change.apply(before)) else None


def torn(num_kills: int) -> Measurements:
    """At least so many kills, of publishers and withdrawals, also of those whose generation holds the whole state."""
    kills = Kills()
    for generations_before, publish in cycle(product((1, _SNAPSHOT_NEXT, 12), (publish_law, withdraw_law))):
        with tempfile.TemporaryDirectory(dir=_IN_MEMORY) as folder:
            prepare(Path(folder), generations_before)
            kill_at_each_step(Path(folder), publish, kills)
        if kills.count >= num_kills:
            break
    return {
        "torn_catalogs": Measurement((kills.torn,)),
        "kills": Measurement((kills.count,)),
        "kills_that_left_the_new": Measurement((kills.new,)),
    }
