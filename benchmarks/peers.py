"""Other systems on the same model and workload, each in a process of its own, beside ours in the same run.

The scripts that run them are not part of this package: they lie in a folder that the caller names. Each takes the
model's folder and `--adapters N`, and prints a line `RESULT {json}` with `concurrency` and `tokens_per_s` for each
concurrency.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import Bench, Peers
from benchmarks.figures import CONCURRENCY, Measurement, Measurements, mixed_name
from benchmarks.system import Size, System
from benchmarks.throughput import loads
from cluster.errors import InvalidInput

_PEFT_SCRIPT, _VLLM_SCRIPT = "peft_generate.py", "vllm_generate.py"
_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class _Peer:
    """One system, by the name it has in the figures."""

    name: str
    python: Path
    script: Path


def check_peers(peers: Peers) -> None:
    """Raise `InvalidInput` unless the scripts and the interpreter are where they should be."""
    for script in (_PEFT_SCRIPT, _VLLM_SCRIPT):
        if not (peers.folder / script).is_file():
            raise InvalidInput(
                f"There is no {script} in {peers.folder}; name the folder of the scripts by --peers-dir."
            )
    if peers.vllm_python is not None and not peers.vllm_python.is_file():
        raise InvalidInput(
            f"--vllm-python is {peers.vllm_python}, which does not exist; expected the Python of an environment in "
            "which vLLM is installed."
        )


def beside_peers(bench: Bench) -> Measurements:
    """Each peer's tokens/s at each concurrency, and ours over it: ours is measured just before and just after.

    A peer that fails is left out, and the first error it named is printed.
    """
    assert bench.peers is not None, "asked for with --peers"
    peers = [_Peer("peft", Path(sys.executable), bench.peers.folder / _PEFT_SCRIPT)]
    if bench.peers.vllm_python is not None:
        peers.append(_Peer("vllm", bench.peers.vllm_python, bench.peers.folder / _VLLM_SCRIPT))
    figures: Measurements = {}
    kinds = {"base": 0, f"mixed{bench.num_adapters}": bench.num_adapters}
    task = bench.progress.add_task("peers", total=len(peers) * len(kinds) * 3, last="")
    with bench.opened(Size(bench.num_adapters)) as system:
        for peer in peers:
            for kind, num_adapters in kinds.items():
                _ours(bench, system, kind)  # to warm up
                before = _ours(bench, system, kind)
                bench.progress.update(task, advance=1, last=f"{peer.name} {kind}", refresh=True)
                theirs = _theirs(bench, peer, num_adapters)
                bench.progress.update(task, advance=1, last=f"ours, {kind}", refresh=True)
                after = _ours(bench, system, kind)
                bench.progress.update(task, advance=1, refresh=True)
                for n, rate in theirs.items():
                    figures[f"{peer.name}_{kind}_{n}"] = Measurement((rate,))
                    figures[f"{kind}_{n}_over_{peer.name}"] = Measurement((before[n] / rate, after[n] / rate))
    return figures


def _ours(bench: Bench, system: System, kind: str) -> dict[int, float]:
    named = loads(bench.num_adapters)
    names = {n: f"base_{n}" if kind == "base" else mixed_name(bench.num_adapters, n) for n in CONCURRENCY}
    return {n: named[name].tokens_per_s(system) for n, name in names.items()}


def _theirs(bench: Bench, peer: _Peer, num_adapters: int) -> dict[int, float]:
    """Tokens/s by concurrency; empty when the script failed."""
    command = [str(peer.python), str(peer.script), str(bench.model.folder), "--adapters", str(num_adapters)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    results = [
        json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    if done.returncode != 0 or not results:
        bench.progress.console.print(f"{peer.name} failed and is left out: {_cause(done.stderr)}", markup=False)
        return {}
    return {int(result["concurrency"]): float(result["tokens_per_s"]) for result in results}


def _cause(stderr: str) -> str:
    """The first line that names an error, which later ones follow from; else the last."""
    lines = stderr.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if re.search(r"\b\w+Error: ", line)), lines[-1])
