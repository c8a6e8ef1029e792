"""Where the time of a load goes: torch's profiler over one play of it."""

from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import Bench
from benchmarks.system import Size
from benchmarks.throughput import MANY, loads
from cluster.errors import InvalidInput

_ROWS = 30


def print_profile(bench: Bench, name: str) -> None:
    """Play the load of this name once unobserved and once observed; print the operators that took most time."""
    named = loads(bench.num_adapters)
    if name not in named:
        raise InvalidInput(f"--profile is {name!r}; expected one of {', '.join(named)}.")
    with bench.opened(Size(max(MANY, bench.num_adapters))) as system:
        unobserved = named[name].tokens_per_s(system)
        first_step = system.engine.stats().num_steps
        with profile(activities=[ProfilerActivity.CPU]) as observed:
            under_profile = named[name].tokens_per_s(system)
        num_steps = system.engine.stats().num_steps - first_step
    print(observed.key_averages().table(sort_by="self_cpu_time_total", row_limit=_ROWS))
    step_ms = 1000 * named[name].num_requests * bench.effort.new_tokens / unobserved / num_steps
    print(
        f"{name}: {unobserved:.1f} tokens/s unobserved, {under_profile:.1f} under the profiler; {num_steps} steps of "
        f"{step_ms:.1f} ms unobserved"
    )
