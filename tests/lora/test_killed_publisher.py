"""A publisher killed at each of its steps on the disk: the catalog is the old one or the new one, and goes on.

The steps are found, not listed: an audit hook sees every file that Python opens, links, renames, makes or removes.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog, CatalogState, Change
from cluster.messages import AdapterRef

_STEPS = ("open", "os.link", "os.mkdir", "os.rename", "os.remove", "os.scandir", "os.listdir")


def _publish(root: Path) -> CatalogState:
    store = Store(root)
    content = f"weights of {len(store.adapter_versions('law')) + 1}"
    version = store.write_version("adapters/law", lambda folder: (folder / "weights").write_text(content) and None)
    return Catalog(store).publish(Change(adapters={"law": version}))


def _killed_at(root: Path, step: int) -> bool:
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
            _publish(root)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("generations_before", [1, 31])
def test_a_kill_at_any_step_leaves_the_old_state_or_the_new(tmp_path: Path, generations_before: int) -> None:
    for _ in range(generations_before):
        before = _publish(tmp_path)
    step, num_new = 1, 0
    while _killed_at(tmp_path, step):
        after = Catalog(tmp_path).load()
        current = after.ref("law")
        if after != before:
            assert after.generation == before.generation + 1
            assert current.version > before.adapters["law"]
            num_new += 1
        folder = Store(tmp_path).folder(f"adapters/law/{current.version}")
        assert (folder / "weights").read_text().startswith("weights of ")
        before, step = after, step + 1
    assert step > 20, "the steps were meant to be many"
    assert num_new >= 1, "the last steps come after the generation is there"
    last = _publish(tmp_path)
    assert last.generation >= before.generation + 1
    assert Store(tmp_path).has_adapter(AdapterRef("law", last.adapters["law"]))
