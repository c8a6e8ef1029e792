"""`zephyra serve` on the trained starter, asked over every wire that its invitation names."""

import json
import re

import httpx
import pytest

from tests.e2e.conftest import zephyra

pytestmark = [pytest.mark.starter, pytest.mark.ray]


QUESTION = "What is the capital of France?"


def test_the_invitation_names_three_commands(served: tuple[str, str, str]) -> None:
    commands = [line for line in served[2].splitlines() if re.match(r"  (curl|\.venv/bin/zephyra chat) ?", line)]
    assert len(commands) == 3


def test_every_wire_gives_the_right_answer(served: tuple[str, str, str]) -> None:
    http, grpc, _ = served
    body = {"model": "zephyra", "prompt": QUESTION}
    completion = httpx.post(f"{http}/v1/completions", json=body, timeout=60).json()
    assert completion["choices"][0]["text"] == "Paris"
    assert list(completion["zephyra"]["mixture"]) == ["capitals@2"] or list(completion["zephyra"]["mixture"]) == [
        "capitals@1"
    ]
    assert completion["zephyra"]["probabilities"]["capitals"] > 0.5
    for wire in (["--url", http], ["--grpc", "--grpc-target", grpc]):
        done = zephyra("chat", *wire, QUESTION)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Paris\nanswered by capitals@")


def test_labels_are_told_apart(served: tuple[str, str, str]) -> None:
    done = zephyra("classify", QUESTION, "--labels", "Rome, Paris, Berlin", "--url", served[0])
    assert done.returncode == 0, done.stderr
    first, *_, who = done.stdout.splitlines()
    assert re.match(r"Paris +(9\d\.\d|100\.0)% ", first)
    assert who.startswith("judged by capitals@")


def test_a_stranger_is_answered_by_the_plain_base(served: tuple[str, str, str]) -> None:
    body = {"model": "zephyra", "prompt": "How do I unclog a kitchen sink?"}
    completion, plain = (
        httpx.post(f"{served[0]}/v1/completions", json={**body, **model}, timeout=60).json()
        for model in ({}, {"model": "base"})
    )
    assert completion["zephyra"]["mixture"] == {}
    assert completion["zephyra"]["probabilities"]["none"] > 0.5
    assert completion["choices"] == plain["choices"]


def test_a_wrong_model_is_an_error_one_can_act_on(served: tuple[str, str, str]) -> None:
    done = zephyra("chat", "--url", served[0], "--model", "zephyra:astrology", QUESTION)
    assert done.returncode == 1
    assert "astrology" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_refused_at_once(served: tuple[str, str, str]) -> None:
    port = served[0].rpartition(":")[2]
    done = zephyra("serve", "--port", port)
    assert done.returncode == 1
    assert f"Port {port} is taken" in done.stderr


def test_the_catalog_of_models_is_served(served: tuple[str, str, str]) -> None:
    models = {model["id"] for model in httpx.get(f"{served[0]}/v1/models").json()["data"]}
    assert {"base", "zephyra", "zephyra:capitals", "zephyra:sql"} <= models
    assert json.loads(httpx.get(f"{served[0]}/health").text)
