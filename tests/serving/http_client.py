"""A client of the HTTP wire in this process, and how its answers are read."""

import json

import httpx

from cluster.config.serving import AppSettings
from deployments.api.access import Access
from deployments.api.gateway import Gateway
from deployments.api.openai_api import build_api
from deployments.domains.remote_domains import RemoteDomains
from tests.serving.local import GoneHandle

HI = [{"role": "user", "content": "hi"}]
"""A chat's turns."""


def client_of(gateway: Gateway) -> httpx.AsyncClient:
    """Of a gateway behind which no publisher is."""
    domains = RemoteDomains(GoneHandle(), AppSettings())
    transport = httpx.ASGITransport(build_api(gateway, domains, Access()), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


def events(response):
    """The JSON of each server-sent event; the last must say [DONE]."""
    lines = [block.removeprefix("data: ") for block in response.text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""]
    return [json.loads(line) for line in lines[:-2]]


def error_of(response):
    """The error object, its shape checked."""
    content = response.json()
    assert list(content) == ["error"]
    assert sorted(content["error"]) == ["code", "message", "param", "type"]
    return content["error"]
