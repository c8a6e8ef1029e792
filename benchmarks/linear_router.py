"""The router that tiny ada must beat: word and character n-grams, TF-IDF, logistic regression, all of scikit-learn.

Knows no "none": how sure it is of the best domain says whether a text belongs to any. Letters: B texts, D domains,
C centroids, F features.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, make_union
from sklearn.preprocessing import normalize

from benchmarks.router_metrics import Floats, log_softmax, log_sum_exp

_INVERSE_PENALTY = 30.0
"""Of 10, 30 and 100 the most accurate on a part of CLINC150's train, and the better calibrated of two that were."""
_MOST_ITERATIONS = 200

_MOST_WEIGHTS_OF_LBFGS = 20_000_000
"""It keeps some 25 copies of all weights in double precision; beyond this SAG, which keeps two in single."""
_SAG_ROUNDS = 60
"""Of all texts; more changed no answer on a part of BANKING77's train."""


def ngrams() -> FeatureUnion:
    """TF-IDF of words and pairs of words, and of runs of 3 to 5 characters inside words."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]", dtype=np.float32)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, dtype=np.float32)
    return make_union(words, characters)


class Linear:
    """Logistic regression on n-grams. `fit` before anything else."""

    domains: tuple[str, ...]

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> "Linear":
        """Learn from texts and the domain of each, of at least three domains; gives itself back."""
        assert len(set(labels)) > 2, "with two domains scikit-learn gives one number instead of one per domain"
        self._features = ngrams()
        x_BF = self._features.fit_transform(texts)
        if x_BF.shape[1] * len(set(labels)) <= _MOST_WEIGHTS_OF_LBFGS:
            self._model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=_MOST_ITERATIONS)
        else:
            self._model = LogisticRegression(C=_INVERSE_PENALTY, solver="sag", max_iter=_SAG_ROUNDS, random_state=0)
        with warnings.catch_warnings():
            # Stopped by the number of rounds, as meant.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(x_BF, list(labels))
        self.domains = tuple(str(name) for name in self._model.classes_)
        return self

    def scores(self, texts: Sequence[str]) -> Floats:
        """Log-probabilities [B, D] of the domains, in the order of `domains`."""
        return log_softmax(self._logits(texts))

    def certainty(self, texts: Sequence[str]) -> Floats:
        """[B]: the probability of the likeliest domain, known as MSP."""
        result: Floats = np.exp(self.scores(texts).max(axis=1))
        return result

    def energy(self, texts: Sequence[str]) -> Floats:
        """[B]: the negative free energy, log-sum-exp of the logits; higher for texts of a domain, like certainty."""
        return log_sum_exp(self._logits(texts))

    def _logits(self, texts: Sequence[str]) -> Floats:
        logits: Floats = self._model.decision_function(self._features.transform(texts)).astype(np.float64)
        return logits


class Centroids:
    """The nearest of several means of n-gram vectors, each of one domain: what can be grown without training."""

    def __init__(self, texts: Sequence[str], groups: Sequence[str], domains: Sequence[str]) -> None:
        """One centroid per group of texts; all texts of a group have the same domain."""
        self._features = ngrams().fit(texts)
        self._domains_C: list[str] = []
        self._centroids_CF: NDArray[np.float32] | None = None
        self.add(texts, groups, domains)

    def add(self, texts: Sequence[str], groups: Sequence[str], domains: Sequence[str]) -> None:
        """Centroids of further groups; those that were there stay as they are."""
        x_BF = self._features.transform(texts)
        owner_B = np.array(groups)
        domain_of = dict(zip(groups, domains, strict=True))
        rows: list[Any] = [] if self._centroids_CF is None else [self._centroids_CF]
        for group in sorted(domain_of):
            rows.append(normalize(np.asarray(x_BF[owner_B == group].mean(axis=0))))
            self._domains_C.append(domain_of[group])
        self._centroids_CF = np.concatenate(rows).astype(np.float32)

    def closest(self, texts: Sequence[str]) -> list[str]:
        """The domain of the centroid nearest to each text, by cosine."""
        assert self._centroids_CF is not None
        similarity_BC = self._features.transform(texts) @ self._centroids_CF.T
        return [self._domains_C[index] for index in similarity_BC.argmax(axis=1)]
