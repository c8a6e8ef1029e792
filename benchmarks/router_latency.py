"""How long tiny ada takes for one prompt, on one core: short prompts beside few and many domains, and long prompts.

Every prompt is new to the router. What it routes among beyond the data's own domains are domains of random numbers,
since the time does not depend on which numbers they are.

Letters: D domains, P prototypes, V width.
"""

import copy
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import torch
from torch import nn

from benchmarks.figures import Measurement, Measurements, interleaved, percentile
from benchmarks.linear_router import Linear
from benchmarks.router_bench import BASELINE, RouterBench
from benchmarks.router_data import split_off_calibration
from benchmarks.router_sentences import RememberingModel
from cluster.config.training import RouterSettings
from cluster.router.sentence_encoder import SentenceEncoder
from cluster.router.tiny_ada import TinyAda

NUM_DOMAINS = (10, 1_000, 10_000)

SHORT_WORDS, LONG_WORDS = 20, 4_000

_LEAST_CPU_SHARE = 0.95
"""It does nothing but compute: with less, the times are those of whatever else ran."""

_WARM_UP_CALLS = 20
_NEW_WORD_SHARE = 0.1
_NEW_WORD_LETTERS = 8


class Prompts:
    """Makes prompts that have not been seen before, of words as frequent as in texts, and one in ten made up."""

    def __init__(self, texts: list[str], seed: int = 0) -> None:
        self._words = " ".join(texts).split()
        self._rng = Random(seed)

    def next(self, num_words: int) -> str:
        """A new prompt of so many words."""
        return " ".join(self._next_word() for _ in range(num_words))

    def _next_word(self) -> str:
        if self._rng.random() < _NEW_WORD_SHARE:
            return "".join(self._rng.choices(string.ascii_lowercase, k=_NEW_WORD_LETTERS))
        return self._rng.choice(self._words)


def latency(bench: RouterBench) -> Measurements:
    """p50 of `route` for prompts of 20 words by number of domains, p99 for 4,000 words, and the baseline's p50."""
    data, effort = bench.data("clinc"), bench.effort
    # Without topics it has votes as well, so that all that a router may have takes its time.
    parts = split_off_calibration(data.train.without_topics, 0)
    adas = {kind: _as_served(bench.train(*parts, 0, kind).ada) for kind in bench.kinds}
    linear = Linear().fit(data.train.texts, data.train.domains)
    prompts = Prompts(data.val.texts)
    task = bench.task("latency", effort.rounds * (len(adas) * (len(NUM_DOMAINS) + 1) + 1))

    def timed(call: Callable[[list[str]], object], num_words: int, num_calls: int, share: float) -> Callable[[], float]:
        return lambda: percentile(_times_ms(call, prompts, num_words, num_calls), share)

    runs: dict[str, Callable[[], float]] = {}
    for kind, ada in adas.items():
        routers = {number: among_random_domains(ada, number) for number in NUM_DOMAINS}
        for number, router in routers.items():
            runs[f"{kind}p50_ms_{number}"] = timed(router.route, SHORT_WORDS, effort.short_calls, 0.5)
        runs[f"{kind}p99_ms_long"] = timed(routers[NUM_DOMAINS[0]].route, LONG_WORDS, effort.long_calls, 0.99)
    runs[f"{BASELINE}p50_ms_10"] = timed(linear.scores, SHORT_WORDS, effort.short_calls, 0.5)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    with _one_thread():
        times = interleaved(runs, effort.rounds, lambda _: task.done())
    share = (time.process_time() - start_cpu_s) / (time.perf_counter() - start_s)
    if share < _LEAST_CPU_SHARE:
        bench.progress.print(
            f"latency: this process had a core {share:.0%} of the time only; run it on an idle machine"
        )
    return {name: Measurement(repeats) for name, repeats in times.items()}


def among_random_domains(ada: TinyAda, num_domains: int) -> TinyAda:
    """`ada` with so many domains of random unit vectors instead of its own, each of the usual number of prototypes.

    That is the default of `RouterSettings.prototypes_per_domain`; the data's own domains may have more, one for each of
    their topics. What is novel takes part in them as in domains that were added while serving, of which nothing can be
    left out. Written into the head at once: domain by domain, `with_domain` would copy all rows ten thousand times.
    """
    head = copy.deepcopy(ada.head)
    random = torch.Generator().manual_seed(num_domains)
    shape = (num_domains, RouterSettings().prototypes_per_domain, head.prototypes_DPV.shape[2])
    head.prototypes_DPV = nn.functional.normalize(torch.randn(shape, generator=random), dim=-1)
    head.num_prototypes_D = torch.full(shape[:1], shape[1])
    head.offsets_D = torch.zeros(num_domains)
    names = tuple(f"domain{number:06}" for number in range(num_domains))
    return TinyAda(names, ada.encoder, head, ada.policy).eval()


def _as_served(ada: TinyAda) -> TinyAda:
    """`ada` whose sentence encoder, if it has one, remembers no text."""
    if isinstance(ada.encoder, SentenceEncoder) and isinstance(ada.encoder.sentences, RememberingModel):
        ada.encoder.sentences = ada.encoder.sentences.forgetful()
    return ada


def _times_ms(call: Callable[[list[str]], object], prompts: Prompts, num_words: int, num_calls: int) -> list[float]:
    """How long each of so many calls took, each with one prompt, after a few that warm up."""
    times_ms = []
    for number in range(_WARM_UP_CALLS + num_calls):
        texts = [prompts.next(num_words)]
        start_s = time.perf_counter()
        call(texts)
        if number >= _WARM_UP_CALLS:
            times_ms.append(1000 * (time.perf_counter() - start_s))
    return times_ms


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
