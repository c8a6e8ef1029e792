"""One classification on the terminal, over HTTP: the labels, the likeliest first, and the domains that judged."""

from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from cluster.errors import ZephyraError
from deployments.commands.chat import authorization, reason_of, trusting


def classify(url: str, body: dict[str, Any], console: Console, api_key: str | None, ca: Path | None) -> None:
    """Ask /v1/classify at `url` and print the answer. Raises `ZephyraError` with what the server says is wrong."""
    url = url.rstrip("/")
    try:
        response = httpx.post(
            f"{url}/v1/classify",
            json=body,
            headers=authorization(api_key),
            verify=True if ca is None else trusting(ca),
            timeout=300,
        )
    except httpx.TransportError as error:
        raise ZephyraError(f"Nothing answers at {url} ({error}); start it with `make serve`.") from None
    if response.status_code != 200:
        raise ZephyraError(reason_of(response))
    answer = response.json()
    width = max(len(score["label"]) for score in answer["scores"])
    for score in sorted(answer["scores"], key=lambda score: -score["probability"]):
        line = f"{score['label']:{width}}  {score['probability']:6.1%}  {score['logprob']:9.4f}"
        console.print(line, markup=False, highlight=False)
    routing = answer["zephyra"]
    named = ", ".join(f"{ref} {weight:.0%}" for ref, weight in routing["mixture"].items()) or "the plain base"
    console.print(f"[dim]judged by {named}, routed in {routing['routing_ms']:.1f} ms[/dim]", highlight=False)
