"""Drives a served root until a second base replica has come and gone again, and counts the requests that failed.

python -m benchmarks.autoscale --root artifacts/starter
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

import httpx

from benchmarks.served_system import ServedSystem, served_system

_IN_FLIGHT = 48
"""Three batches: twice what one replica should have."""
_MAX_TOKENS = 100
_WAIT_S = 180.0


class Traffic:
    """Requests without end, until `stop`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.num_answered = 0
        self.problems: list[str] = []
        self.stop = False

    async def run(self, in_flight: int) -> None:
        limits = httpx.Limits(max_connections=in_flight)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._keep_asking(client) for _ in range(in_flight)))

    async def _keep_asking(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": "What is the capital of France?", "max_tokens": _MAX_TOKENS, "ignore_eos": True}
        while not self.stop:
            try:
                response = await client.post("/v1/completions", json=body)
            except httpx.HTTPError as error:
                self.problems.append(repr(error))
                continue
            if response.status_code == 200:
                self.num_answered += 1
            else:
                self.problems.append(response.text)


async def up_and_down(system: ServedSystem) -> tuple[list[tuple[float, int]], Traffic]:
    """How many replicas ran, and since when, each time that changed. A light load goes on to the end."""
    start_s = time.monotonic()
    seen = [(0.0, await asyncio.to_thread(system.num_running, "BaseReplica"))]

    async def until(wanted: int) -> None:
        end_s = time.monotonic() + _WAIT_S
        while seen[-1][1] != wanted and time.monotonic() < end_s:
            await asyncio.sleep(0.5)
            running = await asyncio.to_thread(system.num_running, "BaseReplica")
            if running != seen[-1][1]:
                seen.append((time.monotonic() - start_s, running))

    heavy, light = Traffic(system.http), Traffic(system.http)
    tasks = [asyncio.create_task(heavy.run(_IN_FLIGHT)), asyncio.create_task(light.run(2))]
    await until(2)
    heavy.stop = True
    await tasks[0]
    await until(1)
    light.stop = True
    await tasks[1]
    light.num_answered += heavy.num_answered
    light.problems += heavy.problems
    return seen, light


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscale", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="a trained system")
    root = parser.parse_args().root.resolve()
    with served_system(root, max_replicas=2, upscale_delay_s=2, downscale_delay_s=5, threads=1) as system:
        seen, traffic = asyncio.run(up_and_down(system))
    for after_s, running in seen:
        print(f"{after_s:6.1f} s  {running} base replicas")
    for problem in traffic.problems[:5]:
        print(problem)
    figures = {
        "replicas": [running for _, running in seen],
        "answered": traffic.num_answered,
        "failed": len(traffic.problems),
    }
    print(f"RESULT {json.dumps(figures)}")


if __name__ == "__main__":
    main()
