"""Data sets by their id on the hub, out of a cache laid out as the hub's library lays it out; there is no network."""

from pathlib import Path

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import InvalidData
from cluster.training.data import read_data
from cluster.training.hub_data import find_data
from deployments.commands.command_line import stage_settings
from deployments.train import parser
from deployments.train import settings_of as job_settings
from tests.training.rows import COLUMNS, write_parquet


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def publish(cache: Path, repository: str, branch: str, name: str) -> Path:
    """Rows of `COLUMNS` as a file of a snapshot in the cache; the folder of the snapshot."""
    commit = f"{len(branch):040d}"
    of_repository = cache / f"datasets--{repository.replace('/', '--')}"
    snapshot = of_repository / "snapshots" / commit
    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        table = pa.table(COLUMNS).drop_columns("split")
        (of_repository / "blobs").mkdir()
        pq.write_table(table, of_repository / "blobs" / "0")
        (snapshot / name).symlink_to(of_repository / "blobs" / "0")
    else:
        (snapshot / name).write_text("prompt,response")
    (of_repository / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
    (of_repository / "refs" / branch).write_text(commit)
    return snapshot


@pytest.mark.parametrize(
    ("branch", "name"),
    [("main", "data/train-00000-of-00001.parquet"), ("refs/convert/parquet", "default/train/0000.parquet")],
)
def test_what_the_cache_holds_is_found_and_read(cache: Path, branch: str, name: str) -> None:
    if branch != "main":
        publish(cache, "somebody/rows", "main", "train.csv")
    snapshot = publish(cache, "somebody/rows", branch, name)
    found = find_data("somebody/rows")
    assert found.samefile(snapshot)
    assert [row.prompt for row in read_data(found).rows("train")] == COLUMNS["prompt"]


def test_commands_and_jobs_take_an_id_as_they_take_a_folder(cache: Path, tmp_path: Path) -> None:
    snapshot = publish(cache, "somebody/rows", "main", "train.parquet")
    assert stage_settings("trial", "somebody/rows", str(tmp_path / "root")).data.samefile(snapshot)
    options = parser().parse_args(["base", "--root", str(tmp_path / "root"), "--data", "somebody/rows"])
    assert job_settings(options).data.samefile(snapshot)


def test_a_folder_is_a_folder_though_it_reads_as_an_id(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(cache, "somebody/rows", "main", "train.parquet")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody/rows").mkdir(parents=True)
    assert find_data("somebody/rows") == write_parquet(tmp_path / "somebody/rows")
    assert find_data("nothing-such") == tmp_path / "nothing-such"


def test_what_could_not_be_had_whole_is_not_replaced_by_another_form(cache: Path) -> None:
    publish(cache, "somebody/rows", "refs/convert/parquet", "default/train/0000.parquet")
    with pytest.raises(InvalidData, match="neither in the local cache nor to be had now"):
        find_data("somebody/rows")


def test_what_cannot_be_had_says_what_to_do(cache: Path) -> None:
    with pytest.raises(
        InvalidData, match=r"no folder 'somebody/else'.*hf download --repo-type dataset somebody/else` wh"
    ):
        find_data("somebody/else")
    publish(cache, "somebody/csv", "main", "train.csv")
    with pytest.raises(InvalidData, match="no folder 'somebody/csv'"):
        find_data("somebody/csv")
