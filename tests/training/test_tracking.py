"""Curves of runs, read back record by record as TensorBoard does; and what artifacts say of how they were made."""

import json
import struct
from collections import defaultdict
from pathlib import Path

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from cluster.config.training import Recipe, StageSettings
from cluster.training.provenance import FILE, write_provenance
from cluster.training.run import LocalRun
from tests.training.rows import write_parquet


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Step and value of every scalar: records of a length, its checksum, so many bytes and their checksum."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                found[value.tag][event.step] = value.simple_value
    return found


def run_once(folder: Path, events: Path, steps: range) -> None:
    with LocalRun("base", folder, Console(quiet=True), events) as run:
        run.start("1/4 base", 20)
        for step in steps:
            run.report(step, {"loss": 1 / step})


def test_the_curve_of_a_run_is_on_the_disk_with_its_last_step(tmp_path: Path) -> None:
    run_once(tmp_path / "run", tmp_path / "events", range(1, 21))
    (loss,) = curves(tmp_path / "events").values()
    assert loss == pytest.approx({step: 1 / step for step in loss})
    assert {1, 20} <= loss.keys()
    assert list(curves(tmp_path / "events")) == ["base/loss"]


def test_a_run_that_goes_on_continues_its_curve(tmp_path: Path) -> None:
    run_once(tmp_path / "run", tmp_path / "events", range(1, 6))
    run_once(tmp_path / "run", tmp_path / "events", range(6, 21))
    assert {1, 6, 20} <= curves(tmp_path / "events")["base/loss"].keys()


def test_a_run_without_a_place_for_curves_keeps_none(tmp_path: Path) -> None:
    with LocalRun("base", tmp_path / "run", Console(quiet=True)) as run:
        run.start("1/4 base", 1)
        run.report(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_says_what_it_was_made_of_and_other_data_another_digest(tmp_path: Path) -> None:
    digests = []
    for prompt in ("7 times 6", "6 times 9"):
        (data := tmp_path / prompt).mkdir()
        write_parquet(data, prompt=["is this legal?", "may I sue?", prompt, "good morning"])
        write_provenance(data, "router", StageSettings(root=tmp_path, data=data, recipe=Recipe(seed=7), name="mine"))
        made = json.loads((data / FILE).read_text())
        assert (made["stage"], made["recipe"], made["seed"]) == ("router", "mine", 7)
        assert Recipe.model_validate(made["settings"]) == Recipe(seed=7)
        assert len(made["code"]["sources"]) == 64
        digests.append(made["data"])
    assert digests[0] != digests[1]
