"""Bases by their id on the hub, out of a cache laid out as the hub's library lays it out; there is no network here."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from cluster.config.places import is_hub_id
from cluster.config.serving import AppSettings
from cluster.errors import InvalidInput, NotTrained
from cluster.model.base import fingerprint
from cluster.model.hub import find_base, hub_folder
from deployments.replica.base_folder import base_folder
from tests.model.foreign import write_foreign

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds `somebody/small-qwen`: blobs, and a snapshot of links to them."""
    folder = tmp_path / "hub"
    repository = folder / "models--somebody--small-qwen"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(write_foreign(tmp_path / "plain").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def test_what_the_cache_holds_is_found_without_a_network(cache: Path, tmp_path: Path) -> None:
    expected = cache / "models--somebody--small-qwen" / "snapshots" / COMMIT
    assert hub_folder("somebody/small-qwen", cache).samefile(expected)
    assert find_base("somebody/small-qwen").samefile(expected)
    settings = AppSettings(base="somebody/small-qwen")
    assert base_folder(settings).samefile(expected)
    assert fingerprint(base_folder(settings)) == fingerprint(expected)
    assert settings.resolved_root() == AppSettings(root="artifacts/small-qwen").resolved_root()


def test_what_cannot_be_had_says_what_to_do(cache: Path) -> None:
    with pytest.raises(
        NotTrained, match=r"no folder 'somebody/else'.*`hf download somebody/else` where there is a netw"
    ):
        base_folder(AppSettings(base="somebody/else"))
    with pytest.raises(InvalidInput, match="take it over first by `zephyra train base --base somebody/small-qwen`"):
        base_folder(AppSettings(base="somebody/small-qwen", quantization="int8"))


def test_what_reads_as_an_id() -> None:
    assert all(is_hub_id(text) for text in ("HuggingFaceTB/SmolLM3-3B", "Qwen/Qwen2.5-0.5B-Instruct", "a/b"))
    assert not any(is_hub_id(text) for text in ("artifacts/mine", "/models/a", "./a/b", "../a", "a", "a/b/c", "~/a"))
