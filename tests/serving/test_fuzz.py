"""Schemathesis against the OpenAPI description, over a real port: whatever is sent, no answer is a server's error, and
each is one that the description promises. `pytest tests/serving/test_fuzz.py --fuzz-cases 5000 -s` sends so many.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster.lora.catalog import Catalog
from tests.serving.local_server import listening, whole_system

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MODELS = ["zephyra", "base", "zephyra:law", "zephyra:law@1", "zephyra:art"]
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
MAX_TOKENS = 4
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/classify")


def within_reach(case: schemathesis.Case) -> None:
    """Let some of what chance would never find be found, and none take long: names that are there, short answers."""
    if "name" in case.path_parameters and case.method != "DELETE" and len(case.path_parameters["name"]) % 2:
        case.path_parameters["name"] = "law"
    body: Any = case.body
    if not isinstance(body, dict) or case.path not in GENERATING:
        return
    if isinstance(body.get("model"), str) and len(body["model"]) % 2:
        body["model"] = MODELS[len(body["model"]) // 2 % len(MODELS)]
    messages = body.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict) and "role" in messages[-1]:
        messages[-1]["role"] = "user"
    if case.path == "/v1/classify" and len(str(body)) % 2:
        # One prompt and distinct labels are seldom made by chance.
        body.update(prompt=f"{body.get('prompt')}?", labels=["yes", "no"], mixture={})
        body.pop("messages", None)
    for name in ("max_tokens", "max_completion_tokens"):
        if type(body.get(name)) is int and body[name] > 0:
            body[name] = MAX_TOKENS
    if case.path != "/v1/classify":
        body.setdefault("max_tokens", MAX_TOKENS)
    if type(body.get("timeout_s")) in (int, float) and 0 < body["timeout_s"] < 60:
        # Which 504 would answer, as it should.
        body["timeout_s"] = 60


def sends(schema: Any, operation: Any, mode: Any, num_cases: int, send: Callable[[Any], None]) -> None:
    """Send so many cases of one operation, or as many as there are: some can be given nothing that is wrong."""

    @seed(0)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        send(case)

    with suppress(Unsatisfiable):
        run()


def test_nothing_that_is_sent_breaks_it_or_is_answered_otherwise_than_promised(
    template: Path, tmp_path: Path, temp: Path, pytestconfig: pytest.Config
) -> None:
    num_cases = pytestconfig.getoption("--fuzz-cases")
    root = shutil.copytree(template / "root", tmp_path / "root")
    before = Catalog(root).load()
    statuses: Counter[tuple[str, int]] = Counter()
    with (
        listening(partial(whole_system, root, adapter_folder=str(template))) as (host, port, _),
        requests.Session() as session,
    ):

        def send(case: schemathesis.Case) -> None:
            within_reach(case)
            response = case.call(session=session, timeout=60)
            statuses[f"{case.method} {case.path}", response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        schema = schemathesis.openapi.from_url(f"http://{host}:{port}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        # Those with few cases first: what they leave over goes to the others.
        operations.sort(key=lambda operation: (bool(operation.body), operation.path, operation.method))
        kinds = [(operation, mode) for operation in operations for mode in MODES]
        for index, (operation, mode) in enumerate(kinds):
            sends(schema, operation, mode, (num_cases - statuses.total()) // (len(kinds) - index), send)
    for (operation, status), count in sorted(statuses.items()):
        print(f"{operation} {status}: {count}")
    server_errors = sum(count for (_, status), count in statuses.items() if status >= 500)
    print(f"server_errors {server_errors} of {statuses.total()} cases")
    assert statuses.total() >= num_cases * 0.9
    assert server_errors == 0
    answered = [statuses[f"POST {path}", 200] for path in (*GENERATING, "/v1/route")]
    assert min(answered) > 0, "nothing but refusals says little"
    assert Catalog(root).load().base == before.base
