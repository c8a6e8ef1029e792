"""Bases by their id on the Hugging Face hub, such as `HuggingFaceTB/SmolLM3-3B`: from the local cache, else downloaded.

Only safetensors, JSON and tokenizer files are fetched: no pickles, no code.
"""

from pathlib import Path

from huggingface_hub import snapshot_download

from cluster.config.places import absolute, is_hub_id
from cluster.errors import NotTrained

_FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_LEFT = ["*/*", "consolidated*"]
"""Other forms of the same weights, and folders: what serves lies at the top."""


def find_base(named: str) -> Path:
    """The folder of the base that a user named: a folder, or an id on the hub if there is no such folder.

    Raises `NotTrained` for an id that is neither in the cache nor to be had from the hub.
    """
    folder = absolute(named)
    return folder if folder.is_dir() or not is_hub_id(named) else hub_folder(named)


def hub_folder(repository: str, cache: Path | None = None) -> Path:
    """The folder of a repository in `cache`, by default the hub's own (HF_HOME); downloaded if it is not there whole.

    Raises `NotTrained`.
    """
    try:
        return Path(_snapshot(repository, cache, local_files_only=True))
    except FileNotFoundError:
        pass
    try:
        return Path(_snapshot(repository, cache, local_files_only=False))
    # The hub's library raises errors of several HTTP libraries: offline, unknown, gated, interrupted.
    except Exception as error:
        raise NotTrained(
            f"There is no folder {repository!r}, and as an id on the Hugging Face hub it is neither in the local cache "
            f"nor to be had now ({type(error).__name__}); check its name, log in by `hf auth login` if it is gated, or "
            f"run `hf download {repository}` where there is a network and copy the folder here."
        ) from error


def _snapshot(repository: str, cache: Path | None, local_files_only: bool) -> str:
    folder = snapshot_download(
        repository,
        cache_dir=cache,
        local_files_only=local_files_only,
        allow_patterns=_FETCHED,
        ignore_patterns=_LEFT,
    )
    assert isinstance(folder, str), "this is not a dry run"
    return folder
