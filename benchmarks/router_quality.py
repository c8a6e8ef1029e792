"""How well tiny ada and the linear router tell domains apart, and know what belongs to none. Knows nothing of speed.

Tiny ada learns from nineteen twentieths of train and calibrates on the rest; the linear router, which calibrates
nothing, learns from all of it. Both are measured on the official validation split, from which nothing is chosen.

Letters: B texts, D domains.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from statistics import fmean

import numpy as np
import torch

from benchmarks.figures import Measurements
from benchmarks.linear_router import Centroids, Linear
from benchmarks.router_bench import BASELINE, RouterBench, Tally
from benchmarks.router_data import Texts, few_of_each_intent, split_off_calibration
from benchmarks.router_metrics import Flags, Floats, auroc, calibration_error, false_positive_rate, log_softmax
from cluster.router.tiny_ada import TinyAda

EXAMPLES_PER_INTENT = 5
"""That a domain is added from."""

NUM_PROBED = 3
"""Domains left out of train, one after another, to choose the baseline's score without a look at validation."""

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Judged:
    """What a router says of texts."""

    domains: tuple[str, ...]
    log_p_BD: Floats
    """Over the domains alone, as if none were no choice."""
    inside_B: Floats
    """The score by which texts are let in, fixed beforehand: higher for texts that belong to a domain."""
    probability_B: Floats
    """The other score: the probability of the best domain, beside none where the router knows it."""

    def correct(self, domains: Sequence[str]) -> Flags:
        """[B]: whether the closest domain is the right one."""
        numbers = {name: number for number, name in enumerate(self.domains)}
        # A domain that the router doesn't know is never right.
        right: Flags = self.log_p_BD.argmax(axis=1) == np.array([numbers.get(name, -1) for name in domains])
        return right

    def accuracy(self, domains: Sequence[str]) -> float:
        """The share of texts whose closest domain is the right one."""
        return float(self.correct(domains).mean())


@torch.inference_mode()
def judge(ada: TinyAda, texts: Sequence[str]) -> Judged:
    """What tiny ada says. Its score is its policy's own: the best domain's logit less none's."""
    parts = [ada.logits(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
    logits_BC: Floats = torch.cat(parts).double().numpy()
    best_B = logits_BC[:, :-1].max(axis=1)
    probability_B: Floats = np.exp(log_softmax(logits_BC)[:, :-1].max(axis=1))
    return Judged(ada.domains, log_softmax(logits_BC[:, :-1]), best_B - logits_BC[:, -1], probability_B)


def judge_linear(linear: Linear, texts: Sequence[str], by_energy: bool) -> Judged:
    """What the linear router says. Its score is its energy or its highest probability."""
    certainty_B = linear.certainty(texts)
    inside_B = linear.energy(texts) if by_energy else certainty_B
    return Judged(linear.domains, linear.scores(texts), inside_B, certainty_B)


def clinc(bench: RouterBench) -> Measurements:
    """CLINC150 by domain: accuracy, calibration, and validation's out-of-scope texts, none of them in training."""
    data, tally = bench.data("clinc"), Tally()
    task = bench.task("clinc", bench.effort.seeds * len(bench.kinds) + 1)

    def figures(judged: Judged, outside: Judged) -> dict[str, float]:
        confidence_B: Floats = np.exp(judged.log_p_BD.max(axis=1))
        return {
            "clinc_accuracy": judged.accuracy(data.val.domains),
            "clinc_oos_auroc": auroc(judged.inside_B, outside.inside_B),
            "clinc_oos_fpr95": false_positive_rate(judged.inside_B, outside.inside_B),
            "clinc_ece": calibration_error(confidence_B, judged.correct(data.val.domains)),
            "clinc_oos_auroc_by_probability": auroc(judged.probability_B, outside.probability_B),
            "clinc_oos_fpr95_by_probability": false_positive_rate(judged.probability_B, outside.probability_B),
        }

    for seed, kind in product(range(bench.effort.seeds), bench.kinds):
        trained = bench.train(*split_off_calibration(data.train, seed), seed, kind)
        judged, outside = judge(trained.ada, data.val.texts), judge(trained.ada, data.outside)
        tally.add(figures(judged, outside), kind)
        threshold = trained.ada.policy.threshold
        tally.add(
            {
                "clinc_ece_beside_none": calibration_error(judged.probability_B, judged.correct(data.val.domains)),
                "clinc_false_rejection": float((judged.inside_B < threshold).mean()),
                "clinc_oos_rejection": float((outside.inside_B < threshold).mean()),
                "train_s": trained.train_s,
                "parameters": trained.ada.num_parameters,
            },
            kind,
        )
        task.done()
    by_energy = _prefers_energy(bench)
    linear = Linear().fit(data.train.texts, data.train.domains)
    texts_of_both = (data.val.texts, data.outside)
    tally.add(figures(*(judge_linear(linear, texts, by_energy) for texts in texts_of_both)), BASELINE)
    task.done()
    return tally.measurements()


def near(bench: RouterBench) -> Measurements:
    """One intent of every CLINC150 domain is left out of training: are its texts told from those of the others?"""
    data, tally = bench.data("clinc"), Tally()
    task = bench.task("near", bench.effort.seeds)
    for seed in range(bench.effort.seeds):
        hidden = _one_intent_of_each_domain(data.train, seed)
        train = data.train.where(_has_intent_of(hidden, False))
        inside, outside = (data.val.where(_has_intent_of(hidden, found)).texts for found in (False, True))
        for kind in bench.kinds:
            ada = bench.train(*split_off_calibration(train, seed), seed, kind).ada
            tally.add({"clinc_near_auroc": auroc(judge(ada, inside).inside_B, judge(ada, outside).inside_B)}, kind)
        linear, by_energy = Linear().fit(train.texts, train.domains), _prefers_energy(bench)
        scores = (judge_linear(linear, texts, by_energy).inside_B for texts in (inside, outside))
        tally.add({"clinc_near_auroc": auroc(*scores)}, BASELINE)
        task.done()
    return tally.measurements()


def fewshot(bench: RouterBench) -> Measurements:
    """Each CLINC150 domain in turn is left out of training and added from a few examples; the mean over them.

    The baseline has one centroid per intent, of known domains too. So tiny ada is told which example is which intent's
    as well; what it does without is a row of its own, untold.
    """
    data, tally = bench.data("clinc"), Tally()
    domains = sorted(set(data.train.domains))[: bench.effort.most_left_out]
    task = bench.task("fewshot", bench.effort.fewer_seeds * len(domains) * len(bench.kinds))
    for seed in range(bench.effort.fewer_seeds):
        pairs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for name in domains:
            known, new = (data.train.where(_is(name, found)) for found in (False, True))
            known_val, new_val = (data.val.where(_is(name, found)) for found in (False, True))
            examples = few_of_each_intent(new, EXAMPLES_PER_INTENT, seed)
            for kind in bench.kinds:
                ada = bench.train(*split_off_calibration(known, seed), seed, kind).ada
                for suffix, topics in (("", examples.intents), ("_untold", None)):
                    grown = ada.with_domain(name, examples.texts, topics)
                    pairs[kind, suffix].append(_recall_and_loss(ada, grown, known_val, new_val))
                task.done()
            pairs[BASELINE, ""].append(_grow_centroids(known, examples, known_val, new_val))
        for (prefix, suffix), of_domains in pairs.items():
            recalls, losses = zip(*of_domains, strict=True)
            tally.add({f"fewshot5_recall{suffix}": fmean(recalls), f"fewshot5_old_loss{suffix}": fmean(losses)}, prefix)
    return tally.measurements()


def accuracy_on(name: str) -> Callable[[RouterBench], Measurements]:
    """A scenario: accuracy on one data set, closest domain taken."""

    def measure(bench: RouterBench) -> Measurements:
        data, tally = bench.data(name), Tally()
        task = bench.task(name, bench.effort.fewer_seeds * len(bench.kinds) + 1)
        for seed, kind in product(range(bench.effort.fewer_seeds), bench.kinds):
            ada = bench.train(*split_off_calibration(data.train, seed), seed, kind).ada
            tally.add({f"{name}_accuracy": judge(ada, data.val.texts).accuracy(data.val.domains)}, kind)
            task.done()
        linear = Linear().fit(data.train.texts, data.train.domains)
        judged = judge_linear(linear, data.val.texts, by_energy=False)
        tally.add({f"{name}_accuracy": judged.accuracy(data.val.domains)}, BASELINE)
        task.done()
        return tally.measurements()

    return measure


def _recall_and_loss(ada: TinyAda, grown: TinyAda, known_val: Texts, new_val: Texts) -> tuple[float, float]:
    """Recall of the domain that `grown` knows beside `ada`'s, and the points of accuracy that these lose by it."""
    before, after = (judge(router, known_val.texts).accuracy(known_val.domains) for router in (ada, grown))
    return judge(grown, new_val.texts).accuracy(new_val.domains), 100 * (before - after)


def _grow_centroids(known: Texts, examples: Texts, known_val: Texts, new_val: Texts) -> tuple[float, float]:
    """The same of the baseline."""

    def accuracy(texts: Texts) -> float:
        return fmean(found == right for found, right in zip(router.closest(texts.texts), texts.domains, strict=True))

    router = Centroids(known.texts, known.intents, known.domains)
    before = accuracy(known_val)
    router.add(examples.texts, examples.intents, examples.domains)
    return accuracy(new_val), 100 * (before - accuracy(known_val))


def _prefers_energy(bench: RouterBench) -> bool:
    """Whether energy tells domains left out of train from the others better than probability does, on a part of train.

    The baseline gets the better of its two known scores, chosen as a user could choose: without texts outside.
    """
    if bench.prefers_energy is None:
        learned, held_out = split_off_calibration(bench.data("clinc").train, seed=0)
        gains = []
        for name in Random(0).sample(sorted(set(learned.domains)), NUM_PROBED)[: bench.effort.most_left_out]:
            known = learned.where(_is(name, False))
            linear = Linear().fit(known.texts, known.domains)
            inside, outside = (held_out.where(_is(name, found)).texts for found in (False, True))
            by_energy, by_certainty = (
                auroc(score(inside), score(outside)) for score in (linear.energy, linear.certainty)
            )
            gains.append(by_energy - by_certainty)
        bench.prefers_energy = fmean(gains) > 0
    return bench.prefers_energy


def _one_intent_of_each_domain(texts: Texts, seed: int) -> set[str]:
    """Drawn by `seed`."""
    rng = Random(seed)
    of_domain: dict[str, set[str]] = {}
    for domain, intent in zip(texts.domains, texts.intents, strict=True):
        of_domain.setdefault(domain, set()).add(intent)
    return {rng.choice(sorted(intents)) for _, intents in sorted(of_domain.items())}


def _is(name: str, expected: bool) -> Callable[[str, str], bool]:
    """Whether a row belongs to the domain `name`, or does not."""
    return lambda domain, _: (domain == name) == expected


def _has_intent_of(intents: set[str], expected: bool) -> Callable[[str, str], bool]:
    """Whether a row's intent is one of `intents`, or is not."""
    return lambda _, intent: (intent in intents) == expected
