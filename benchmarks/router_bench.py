"""What all scenarios of the router's benchmark share: the data, how much is run, training, how far it has come."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.command import quiet_progress
from benchmarks.figures import Measurements, SeedMeasurement
from benchmarks.router_data import DataSet, Texts, load
from benchmarks.router_sentences import RememberingModel
from cluster.config.training import RouterSettings
from cluster.router.fit import RouterFit
from cluster.router.tiny_ada import TinyAda

BASELINE = "baseline_"
"""Before the name of a figure: the same of the linear router."""

TAUGHT = "taught_"
"""Before the name of a figure: the same of tiny ada taught by a pretrained sentence encoder, without it in routing."""

PRETRAINED = "pretrained_"
"""Before the name of a figure: the same of tiny ada with a pretrained sentence encoder beside its n-grams."""

KINDS = {"scratch": "", "taught": TAUGHT, "pretrained": PRETRAINED}
"""Tiny ada by what a pretrained sentence encoder has to do with it, and what comes before the names of the figures."""

PRETRAINED_BASE_PARAMETERS = 500_000_000
"""Of the smallest base that such a router is meant for."""


SETTINGS = RouterSettings(
    width=128,
    steps=1200,
    feature_dropout=0.4,
    word_omission=0.3,
    naive_bayes=True,
    word_dropout=0.1,
    outlier_rate=0.1,
    hidden_domain_rate=0.25,
    sketch_share=0.5,
)
"""Whatever the data: chosen on a part of CLINC150's train split; votes, on parts of other train splits."""

READINGS_WITHOUT_TOPICS = 10
"""Of each text, at most, where domains have no kinds: rows then know texts by heart sooner. Chosen on a part of MMLU's
train split."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is run."""

    seeds: int = 5
    """Trainings of tiny ada that a figure is the mean of."""
    fewer_seeds: int = 2
    """Of what takes longer: larger data sets, and every domain left out in turn."""
    settings: RouterSettings = SETTINGS
    """Of every training but for the seed."""
    most_rows: int | None = None
    """Of each split of a data set; all by default."""
    most_left_out: int | None = None
    """Domains that are left out in turn; all by default."""
    curve_base_parameters: tuple[int, ...] = (6_500_000, 25_000_000, 100_000_000, 400_000_000)
    """Of the bases whose routers make the curve of size against quality."""
    short_calls: int = 300
    """Calls with a short prompt whose times make one p50, and of which there are `rounds`."""
    long_calls: int = 300
    rounds: int = 3


QUICK = Effort(
    seeds=1,
    fewer_seeds=1,
    settings=RouterSettings(steps=15, batch_size=64),
    most_rows=1200,
    most_left_out=1,
    curve_base_parameters=(6_500_000, 25_000_000),
    short_calls=5,
    long_calls=5,
    rounds=1,
)


@dataclass(frozen=True, slots=True)
class Trained:
    """A router and what training it took, from texts to the calibrated router."""

    ada: TinyAda
    train_s: float


class RouterBench:
    """What a scenario is given."""

    def __init__(
        self,
        folder: Path,
        effort: Effort,
        num_base_parameters: int,
        console: Console,
        sentences: RememberingModel | None = None,
        kinds: Sequence[str] = tuple(KINDS.values()),
    ) -> None:
        self.folder = folder
        """That all data sets lie below."""
        self.effort = effort
        self.num_base_parameters = num_base_parameters
        """Of the base that the router is to serve, which sets the router's size."""
        self.sentences = sentences
        """The pretrained encoder, where there is one."""
        self.kinds = tuple(kind for kind in kinds if kind == "" or sentences is not None)
        """Of tiny ada, of those in `KINDS`: without an encoder only the one that needs none."""
        self.prefers_energy: bool | None = None
        """Which score of the baseline tells texts outside better, once that was found out."""
        self._sets: dict[str, DataSet] = {}
        self.progress = quiet_progress(console)

    def data(self, name: str) -> DataSet:
        """The data set, read once. Raises like `router_data.load`."""
        if name not in self._sets:
            self._sets[name] = load(name, self.folder, self.effort.most_rows)
        return self._sets[name]

    def task(self, what: str, total: int) -> "Task":
        """Something of `total` parts, to be shown as it goes on."""
        task = Task(self.progress, self.progress.add_task(what, total=total))
        self.progress.refresh()
        return task

    def train(
        self, learned: Texts, calibration: Texts, seed: int, kind: str = "", num_base_parameters: int | None = None
    ) -> Trained:
        """Tiny ada of one of `kinds`; where the data names kinds of text within domains, it learns these too."""
        sentences = None if kind == "" else self.sentences
        teacher = "the one at hand" if kind == TAUGHT else None
        settings = self.effort.settings.model_copy(update={"seed": seed, "teacher": teacher})
        if not learned.names_topics:
            steps = -(-READINGS_WITHOUT_TOPICS * len(learned) // settings.batch_size)
            settings = settings.model_copy(update={"steps": min(settings.steps, steps)})
        size = num_base_parameters or self.num_base_parameters
        if kind == PRETRAINED:
            size = max(size, PRETRAINED_BASE_PARAMETERS)
        saved_s = 0.0 if sentences is None else sentences.saved_s
        start_s = time.perf_counter()
        fit = RouterFit(
            learned.texts,
            learned.domains,
            calibration.texts,
            calibration.domains,
            settings,
            num_base_parameters=size,
            topics=learned.intents,
            sentences=sentences,
        )
        for _ in range(fit.num_steps):
            fit.step()
        ada = fit.finish()
        train_s = time.perf_counter() - start_s
        return Trained(ada, train_s if sentences is None else train_s + sentences.saved_s - saved_s)


class Task:
    """How far one scenario has come."""

    def __init__(self, progress: Progress, number: TaskID) -> None:
        self._advance = partial(progress.update, number, advance=1, refresh=True)

    def done(self) -> None:
        """One part more."""
        self._advance()


class Tally:
    """Collects what each seed gave for each figure."""

    def __init__(self) -> None:
        self._repeats: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, float], prefix: str = "") -> None:
        """One seed's values, by figure."""
        for name, value in values.items():
            self._repeats[prefix + name].append(float(value))

    def measurements(self) -> Measurements:
        """All figures, in the order in which they first came."""
        return {name: SeedMeasurement(tuple(values)) for name, values in self._repeats.items()}
