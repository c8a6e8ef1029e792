"""What all scenarios share: the model, how much is run, how far it has come. Knows nothing of any one of them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import TextColumn

from benchmarks.command import quiet_progress
from benchmarks.figures import interleaved
from benchmarks.system import Size, System, TimedModel, opened


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is run."""

    new_tokens: int = 64
    """Of each request."""
    rounds: int = 5
    """Repeats of each load."""
    warm_up_rounds: int = 1
    """Before those that count."""
    turnover_requests: int = 80
    """Of the closed loop over more domains than the slot bank holds."""
    turnover_rounds: int = 3
    open_requests: int = 200
    """Of the open loop with one hot domain and many cold ones."""
    open_rounds: int = 3
    quality_rows_per_domain: int = 100


QUICK = Effort(
    new_tokens=4,
    rounds=1,
    warm_up_rounds=0,
    turnover_requests=36,
    turnover_rounds=1,
    open_requests=24,
    open_rounds=1,
    quality_rows_per_domain=4,
)


@dataclass(frozen=True, slots=True)
class Peers:
    """The scripts that time other systems on the same model and workload."""

    folder: Path
    vllm_python: Path | None
    """Python of the environment that vLLM is installed in."""


@dataclass(frozen=True, slots=True)
class Quality:
    """A trained base, to see what quantization costs it."""

    base_folder: Path
    data: Path
    """Parquet files with rows of the split `test`."""


class Bench:
    """What a scenario is given."""

    def __init__(
        self,
        model: TimedModel,
        num_adapters: int,
        effort: Effort,
        bandwidth: float,
        console: Console,
        peers: Peers | None,
        quality: Quality | None,
    ) -> None:
        self.model = model
        self.num_adapters = num_adapters
        """That requests of mixed loads take in turn."""
        self.effort = effort
        self.bandwidth = bandwidth
        """Bytes per second that this machine reads from memory."""
        self.peers = peers
        self.quality = quality
        self.progress = quiet_progress(console, TextColumn("{task.fields[last]}"))

    def opened(self, size: Size, base_folder: Path | None = None) -> AbstractContextManager[System]:
        """An engine of this size on the model's own base, or on another form of it."""
        return opened(self.model, base_folder or self.model.base_folder, size, self.effort.new_tokens)

    def interleaved(
        self, what: str, runs: Mapping[str, Callable[[], float]], rounds: int, is_warm: bool = False
    ) -> dict[str, tuple[float, ...]]:
        """Run all of `runs` in turn so many rounds, after those that warm up; gives what the former returned."""
        warm_up_rounds = 0 if is_warm else self.effort.warm_up_rounds
        task = self.progress.add_task(what, total=len(runs) * (warm_up_rounds + rounds), last="")

        def done(name: str) -> None:
            self.progress.update(task, advance=1, last=name, refresh=True)

        interleaved(runs, warm_up_rounds, done)
        return interleaved(runs, rounds, done)
