"""Which share of the time to first token is spent in routing: a served root, prompts of its data one after the other.

    python -m benchmarks.routing_share --root artifacts/starter --data artifacts/starter-data

Time to first token is the client's, over HTTP; routing is the way to the router and back, as the answer says.
"""

import argparse
import json
import random
import time
from pathlib import Path

import httpx
import pyarrow.dataset

from benchmarks.figures import Measurement, percentile
from benchmarks.report import result_line
from benchmarks.served_system import served_system

_WARM_UP = 20


def prompts_of(data: Path, num_prompts: int) -> list[str]:
    """Of the split `test`, drawn anew from the same seed."""
    table = pyarrow.dataset.dataset(data, format="parquet").to_table()
    prompts = [row["prompt"] for row in table.to_pylist() if row.get("split") == "test" and row.get("prompt")]
    return random.Random(0).choices(prompts, k=num_prompts)


def first_token(client: httpx.Client, prompt: str) -> tuple[float, float]:
    """Milliseconds to the first event of a streamed answer, and of routing."""
    body = {"prompt": prompt, "max_tokens": 2, "stream": True}
    start_s = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        line = next(line for line in lines if line.startswith("data: {"))
        first_ms = (time.perf_counter() - start_s) * 1000
        for _ in lines:
            pass
    return first_ms, float(json.loads(line.removeprefix("data: "))["zephyra"]["routing_ms"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing_share", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="a trained system")
    parser.add_argument("--data", type=Path, required=True, help="Parquet files with rows of the split test")
    parser.add_argument("--requests", type=int, default=500)
    options = parser.parse_args()
    prompts = prompts_of(options.data, options.requests + _WARM_UP)
    with served_system(options.root.resolve()) as system, httpx.Client(base_url=system.http, timeout=60) as client:
        timed = [first_token(client, prompt) for prompt in prompts][_WARM_UP:]
    shares = [of_routing / of_all for of_all, of_routing in timed]
    first_ms, routing_ms = zip(*timed, strict=True)
    figures = {
        "time_to_first_token_ms_p50": percentile(first_ms, 0.5),
        "routing_ms_p50": percentile(routing_ms, 0.5),
        "routing_ms_p99": percentile(routing_ms, 0.99),
        "routing_share_p50": percentile(shares, 0.5),
        "routing_share_p99": percentile(shares, 0.99),
    }
    print(result_line({name: Measurement((value,)) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
