"""What int8 and int4 weights give and cost: decode speed of one request, memory, perplexity of a trained base."""

import ctypes
import gc
import os
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from benchmarks.bench import Bench
from benchmarks.figures import Measurement, Measurements, paired_ratios
from benchmarks.system import Size, System, plain
from cluster.config.settings import Quantization
from cluster.model.base import load_base, quantize_base
from cluster.training.perplexity import quantization_costs, rows_of_all_domains

QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "int4")
_SIZE = Size(num_slots=1, num_contexts=1)


def decode_rates(bench: Bench) -> Measurements:
    """Decode tokens/s of one request over bf16's, and the memory of a serving engine over that of bf16 weights alone.

    The memory is what the process grows by: weights in whatever form and however often the engine keeps them, pages
    mapped from files included, and little else. So bf16's own share says what the engine keeps beside the weights.
    """
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folders = {"bf16": bench.model.base_folder}
        for quantization in QUANTIZATIONS:
            folders[quantization] = Path(temporary) / quantization
            folders[quantization].mkdir()
            quantize_base(bench.model.base_folder, folders[quantization], quantization)
        _use_once(bench)
        weight_bytes = load_base(bench.model.base_folder, torch.bfloat16).weight_bytes
        systems: dict[str, System] = {}
        num_bytes: dict[str, int] = {}
        for name, folder in folders.items():
            before = resident_bytes()
            systems[name] = stack.enter_context(bench.opened(_SIZE, folder))
            systems[name].play(1, plain)
            num_bytes[name] = resident_bytes() - before
        runs = {name: partial(_decode_rate, system) for name, system in systems.items()}
        rates = bench.interleaved("quantized, 1 request", runs, bench.effort.rounds)
    figures = {f"{name}_memory": Measurement((grown / weight_bytes,)) for name, grown in num_bytes.items()}
    for name in QUANTIZATIONS:
        figures[f"{name}_over_bf16_1"] = Measurement(paired_ratios(rates[name], rates["bf16"]))
    return figures


def quality_rises(bench: Bench) -> Measurements:
    """By which share the test perplexity of a trained base rises."""
    assert bench.quality is not None, "asked for with --quality-model"
    task = bench.progress.add_task("perplexity of float, int8, int4", total=1, last="")
    rows = rows_of_all_domains(bench.quality.data, "test", bench.effort.quality_rows_per_domain)
    costs = quantization_costs(bench.quality.base_folder, rows, QUANTIZATIONS)
    bench.progress.update(task, advance=1, refresh=True)
    return {f"{name}_ppl_rise": Measurement((cost.rise,)) for name, cost in costs.items()}


def resident_bytes() -> int:
    """What this process holds in memory, less what it has freed but not yet given back. Linux with glibc only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _use_once(bench: Bench) -> None:
    """What the first use of any engine takes is then taken already."""
    with bench.opened(_SIZE) as system:
        system.play(1, plain)


def _decode_rate(system: System) -> float:
    return system.play(1, plain).decode_tokens_per_s
