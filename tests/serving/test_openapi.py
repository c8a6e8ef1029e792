"""The description at /openapi.json: what each operation does, and every error that it may answer with."""

import httpx
import pytest

from deployments.api.status import STATUS, code_of

pytestmark = pytest.mark.anyio


async def test_every_operation_and_every_error_is_described(client: httpx.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()
    operations = [operation for path in described["paths"].values() for operation in path.values()]
    assert len(operations) >= 13
    named = set()
    for operation in operations:
        assert operation["description"].endswith(".")
        errors = {status: answer for status, answer in operation["responses"].items() if int(status) >= 400}
        assert {"400", "500"} <= errors.keys()
        assert "422" not in errors
        for status, answer in errors.items():
            schema = answer["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}
            codes = answer["description"].split(", ")
            named.update(codes)
            assert {str(STATUS[cls].http) for cls in STATUS if code_of(cls("")) in codes} <= {status}
    assert named == {code_of(cls("")) for cls in STATUS} | {"internal_error"}
    error = described["components"]["schemas"]["ErrorObject"]
    assert sorted(error["properties"]) == ["code", "message", "param", "type"]
