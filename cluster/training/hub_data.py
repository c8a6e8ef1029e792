"""Data sets by their id on the Hugging Face hub, `org/name`: downloaded, or from the local cache without a network.

Only Parquet is fetched. A data set that was put there in another form is on the hub in Parquet as well, in a branch
that the hub itself writes.
"""

from pathlib import Path

from huggingface_hub import snapshot_download

from cluster.config.places import is_hub_id
from cluster.errors import InvalidData

_CONVERTED = "refs/convert/parquet"


def find_data(named: str) -> Path:
    """The data that a user named, absolute: a folder or file, or an id on the hub if there is no such folder.

    Raises `InvalidData` for an id that is neither in the cache nor to be had from the hub.
    """
    place = Path(named).resolve()
    return place if place.exists() or not is_hub_id(named) else _hub_folder(named)


def _hub_folder(repository: str) -> Path:
    try:
        folder = _snapshot(repository, "main")
        if not _has_parquet(folder):
            # Only then: what could not be had whole is not to be replaced by another form of it.
            folder = _snapshot(repository, _CONVERTED)
    # The hub's library raises errors of several HTTP libraries: offline, unknown, gated, interrupted.
    except Exception as error:
        raise _missing(repository, type(error).__name__) from error
    if not _has_parquet(folder):
        raise _missing(repository, "it holds no Parquet")
    return folder


def _snapshot(repository: str, branch: str) -> Path:
    """All Parquet of a branch, completed where there is a network."""
    folder = snapshot_download(repository, repo_type="dataset", revision=branch, allow_patterns=["*.parquet"])
    assert isinstance(folder, str), "this is not a dry run"
    return Path(folder)


def _has_parquet(folder: Path) -> bool:
    return any(folder.rglob("*.parquet"))


def _missing(repository: str, reason: str) -> InvalidData:
    return InvalidData(
        f"There is no folder {repository!r}, and as a data set on the Hugging Face hub it is neither in the local "
        f"cache nor to be had now ({reason}); check its name, log in by `hf auth login` if it is gated, or run "
        f"`hf download --repo-type dataset {repository}` where there is a network and copy the folder here."
    )
