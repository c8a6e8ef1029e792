"""What a token costs in CPU time, by process: some long answers stream at once over HTTP, each of another domain of a
random root, and each process' clock is read before and after. A wait shows in no clock.

    python -m benchmarks.token_cost
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.adapters_root import domain, write_root
from benchmarks.figures import Measurement
from benchmarks.report import result_line
from benchmarks.served_system import served_system

_TOKENS = 300


def cpu_seconds() -> dict[str, float]:
    """Of this process and of Ray's, by what they are; replicas of one deployment together."""
    found: Counter[str] = Counter()
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.pid == os.getpid():
            name = "this client"
        elif command.startswith("ray::"):
            name = command.removeprefix("ray::").split()[0].removeprefix("ServeReplica:zephyra:")
        elif "gcs_server" in command or "raylet" in command:
            name = Path(command.split()[0]).name
        else:
            continue
        times = process.info["cpu_times"]
        found[name] += times.user + times.system
    return dict(found)


async def stream(client: httpx.AsyncClient, model: str) -> int:
    """One answer; how many events it had."""
    body = {"prompt": "hello there", "model": model, "max_tokens": _TOKENS, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        return sum([line.startswith("data: {") async for line in response.aiter_lines()])


async def load(http: str, models: list[str], seconds: float) -> tuple[int, float, dict[str, float]]:
    """Events, seconds, and CPU seconds by process, while one answer of each model is under way after the other."""
    async with httpx.AsyncClient(base_url=http, timeout=120) as client:
        await asyncio.gather(*(stream(client, model) for model in models))
        before, since, events = cpu_seconds(), time.perf_counter(), 0
        while time.perf_counter() - since < seconds:
            events += sum(await asyncio.gather(*(stream(client, model) for model in models)))
        after = cpu_seconds()
        return (
            events,
            time.perf_counter() - since,
            {name: after[name] - before.get(name, 0.0) for name in after},
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_cost", description=__doc__)
    parser.add_argument("--streams", type=int, default=4, help="answers at once, each of another domain")
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    models = [f"zephyra:{domain(number)}" for number in range(options.streams)]
    with tempfile.TemporaryDirectory() as folder:
        write_root(Path(folder), options.streams, rank=8)
        with served_system(Path(folder)) as system:
            events, seconds, spent_s = asyncio.run(load(system.http, models, options.seconds))
    table = Table(title=f"CPU per token, {len(models)} streams, {events / seconds:,.0f} tokens/s", title_justify="left")
    table.add_column("process")
    table.add_column("ms", justify="right")
    for name, spent in sorted(spent_s.items(), key=lambda item: -item[1]):
        if spent * 1000 / events >= 0.01:
            table.add_row(name, f"{spent * 1000 / events:.3f}")
    Console(stderr=True).print(table)
    figures = {"tokens_per_s": events / seconds, "cpu_ms_per_token": sum(spent_s.values()) * 1000 / events}
    print(result_line({name: Measurement((value,)) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
