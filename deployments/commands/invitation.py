"""What `zephyra serve` prints when it is up: where it listens, and what to try."""

import json

from rich.console import Console

from deployments.cluster import HOST, Ports

QUESTION = "What is the capital of France?"


def print_invitation(ports: Ports, needs_key: bool, console: Console) -> None:
    """Three commands to be copied into another terminal, with the key in its environment if one is needed."""
    host = HOST if ports.host in ("0.0.0.0", "::") else ports.host
    host = f"[{host}]" if ":" in host else host
    http = f"{'http' if ports.tls is None else 'https'}://{host}:{ports.http}"
    grpc = f"{HOST}:{ports.grpc}" if ports.tls is None else f"https://{host}:{ports.tls.grpc_port}"
    url = "" if http == f"http://{HOST}:8000" else f" --url {http}"
    target = "--grpc" if grpc == f"{HOST}:9000" else f"--grpc --grpc-target {grpc}"
    trust, trust_curl = ("", "") if ports.tls is None else (f" --ca {ports.tls.cert}", f" --cacert {ports.tls.cert}")
    key = ' -H "authorization: Bearer $ZEPHYRA_API_KEY"' if needs_key else ""
    body = json.dumps({"model": "zephyra", "prompt": QUESTION})
    dashboard = "" if ports.dashboard is None else f"   dashboard http://{HOST}:{ports.dashboard}"
    console.print(
        f"\n[bold green]Zephyra is up.[/] HTTP {http}   gRPC {grpc}{dashboard}\n"
        f"Try, in another terminal{', with a key in ZEPHYRA_API_KEY' if needs_key else ''}:\n",
        highlight=False,
    )
    # Plain print: lines to be copied must not be wrapped.
    print(f"  .venv/bin/zephyra chat{url}{trust}")
    print(f"  curl{trust_curl} {http}/v1/completions{key} -H 'content-type: application/json' -d '{body}'")
    print(f'  .venv/bin/zephyra chat {target}{trust} "{QUESTION}"\n\nCtrl-C stops it.', flush=True)
