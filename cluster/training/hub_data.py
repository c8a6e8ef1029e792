"""Data sets by their id on the Hugging Face hub, such as `openai/gsm8k`: from the local cache, else downloaded.

Only Parquet is fetched. A data set that was put there in another form is on the hub in Parquet as well, in a branch
that the hub itself writes.
"""

from pathlib import Path

from huggingface_hub import snapshot_download

from cluster.config import is_hub_id
from cluster.errors import InvalidData

_BRANCHES = ("main", "refs/convert/parquet")


def find_data(named: str) -> Path:
    """The data that a user named, absolute: a folder or file, or an id on the hub if there is no such folder.

    Raises `InvalidData` for an id that is neither in the cache nor to be had from the hub.
    """
    place = Path(named).resolve()
    return place if place.exists() or not is_hub_id(named) else _hub_folder(named)


def _hub_folder(repository: str) -> Path:
    reason = "it holds no Parquet"
    for local_files_only in (True, False):
        for branch in _BRANCHES:
            try:
                folder = Path(_snapshot(repository, branch, local_files_only))
            # The hub's library raises errors of several HTTP libraries: offline, unknown, gated, interrupted.
            except Exception as error:
                reason = type(error).__name__
                continue
            if any(folder.rglob("*.parquet")):
                return folder
    raise InvalidData(
        f"There is no folder {repository!r}, and as a data set on the Hugging Face hub it is neither in the local "
        f"cache nor to be had now ({reason}); check its name, log in by `hf auth login` if it is gated, or run "
        f"`hf download --repo-type dataset {repository}` where there is a network and copy the folder here."
    )


def _snapshot(repository: str, branch: str, local_files_only: bool) -> str:
    folder = snapshot_download(
        repository,
        repo_type="dataset",
        revision=branch,
        local_files_only=local_files_only,
        allow_patterns=["*.parquet"],
    )
    assert isinstance(folder, str), "this is not a dry run"
    return folder
