"""The weighted sum of many adapters' deltas of one layer, in float64, and how far it can be from any other matrix.

A sum is held as factors X Y^T or, once these are larger than the matrix itself, as the matrix. Every bound here holds
for any order in which a library adds: the error of a sum of products is at most gamma_k |X| |Y|^T (Higham 2002,
"Accuracy and stability of numerical algorithms", 3.1 and 3.5), and || |X| |Y|^T ||_F <= sum_k ||x_k|| ||y_k||.

Letters: M output width, N input width, K columns (the ranks of all adapters, summed), R rank, L columns of a sketch.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.errors import InvalidMixture
from cluster.lora.merge_plan import crossover
from cluster.lora.weights import Factors

UNIT = 2.0**-53
"""Half the distance from 1 to the next float64."""

_FOLDED_COLUMNS = 512
"""So many columns are added to a matrix in one product, however few each adapter has."""

_BLOCK_NUMBERS = 2**24
"""A difference is formed by blocks of at most so many numbers."""

_QR_CONSTANT = 16
"""The small integer that Higham's theorem 19.4 on Householder QR leaves open, generously."""

_QR_SLOWNESS = 3
"""A flop of a QR of few columns takes as long as so many of a product."""

_SMALLEST = 1e-120
"""Added to every bound: what is lost where squares vanish in float64 is less, with factors in fp32's range."""

_LARGEST = float(torch.finfo(torch.float32).max)


def gamma(num_roundings: int) -> float:
    """The most that so many roundings, one upon the other, change a number, relative to it."""
    return num_roundings * UNIT / (1 - num_roundings * UNIT)


def norm(x: Tensor) -> float:
    """The Frobenius norm, rounded up."""
    return float(torch.linalg.vector_norm(x)) * (1 + gamma(x.numel() + 4))


def mass(x_MK: Tensor, y_NK: Tensor) -> float:
    """sum_k ||x_k|| ||y_k||, rounded up: what rounding errors of X Y^T are a share of."""
    norms_K = torch.linalg.vector_norm(x_MK, dim=0) * torch.linalg.vector_norm(y_NK, dim=0)
    return float(norms_K.sum()) * (1 + gamma(len(x_MK) + len(y_NK) + len(norms_K) + 8))


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """A sum and how exactly it is held. One of the forms is there: the matrix, or its factors."""

    factors: tuple[Tensor, Tensor] | None
    """X [M, K] and Y [N, K]."""
    dense_MN: Tensor | None
    num_terms: int
    """Products that were added to make up one number."""
    mass: float
    """At least || |X| |Y|^T ||_F of all that was added."""
    error: float
    """At least the Frobenius distance between the exact sum and what is held."""

    @property
    def columns(self) -> int | None:
        """K where factors are held."""
        return None if self.factors is None else self.factors[0].shape[1]

    @property
    def transposed(self) -> "WeightedSum":
        """The same, outputs and inputs exchanged; nothing is copied."""
        factors = None if self.factors is None else self.factors[::-1]
        return replace(self, factors=factors, dense_MN=None if self.dense_MN is None else self.dense_MN.T)

    @property
    def shape(self) -> tuple[int, int]:
        """M and N."""
        if self.dense_MN is not None:
            return self.dense_MN.shape[0], self.dense_MN.shape[1]
        assert self.factors is not None
        return self.factors[0].shape[0], self.factors[1].shape[0]

    def as_matrix(self) -> "WeightedSum":
        """The same, held as the matrix."""
        if self.factors is None:
            return self
        x_MK, y_NK = self.factors
        error = self.error + gamma(self.num_terms + 2) * self.mass
        return WeightedSum(None, x_MK @ y_NK.T, self.num_terms, self.mass, error)

    def times(self, right_NL: Tensor) -> Tensor:
        """The sum times a matrix, [M, L]."""
        if self.dense_MN is not None:
            return self.dense_MN @ right_NL
        assert self.factors is not None
        x_MK, y_NK = self.factors
        return x_MK @ (y_NK.T @ right_NL)

    def transposed_times(self, left_ML: Tensor) -> Tensor:
        """The sum's transpose times a matrix, [N, L]."""
        if self.dense_MN is not None:
            return self.dense_MN.T @ left_ML
        assert self.factors is not None
        x_MK, y_NK = self.factors
        return y_NK @ (x_MK.T @ left_ML)

    def distance(self, left_MR: Tensor, right_NR: Tensor) -> float:
        """At least the Frobenius distance between the exact sum and `left @ right.T`, and hardly more.

        The difference is formed and measured: nothing is assumed of how the factors came about.
        """
        total_mass = self.mass + mass(left_MR, right_NR)
        num_out, num_in = self.shape
        if self.factors is not None:
            width = self.factors[0].shape[1] + left_MR.shape[1]
            if _QR_SLOWNESS * (num_out + num_in) * width < num_out * num_in:
                return self._distance_of_cores(left_MR, right_NR, width, total_mass) + self.error
        squares, rows = 0.0, max(1, _BLOCK_NUMBERS // num_in)
        for start in range(0, num_out, rows):
            block = slice(start, start + rows)
            of_block = norm(self._rows(block).addmm_(left_MR[block], right_NR.T, alpha=-1))
            squares += of_block * of_block
        rounding = gamma(self.num_terms + left_MR.shape[1] + 4) * total_mass
        return math.sqrt(squares) * (1 + gamma(num_out + 4)) + rounding + self.error + _SMALLEST

    def _rows(self, block: slice) -> Tensor:
        """Some rows of the matrix, as a copy."""
        if self.dense_MN is not None:
            return self.dense_MN[block].clone()
        assert self.factors is not None
        return self.factors[0][block] @ self.factors[1].T

    def _distance_of_cores(self, left_MR: Tensor, right_NR: Tensor, width: int, total_mass: float) -> float:
        """Orthogonal columns leave the norm as it is: that of [X, -L] [Y, R]^T is that of the R factors' product."""
        assert self.factors is not None
        _, upper = torch.linalg.qr(torch.cat([self.factors[0], -left_MR], dim=1), mode="r")
        _, other = torch.linalg.qr(torch.cat([self.factors[1], right_NR], dim=1), mode="r")
        rounding = 4 * gamma(_QR_CONSTANT * max(self.shape) * width) * total_mass
        return norm(upper @ other.T) + rounding + _SMALLEST


class Accumulator:
    """Adds deltas of one layer up."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self._shape = (out_features, in_features)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._num_pending = 0
        self._dense_MN: Tensor | None = None
        self._num_terms = 0
        self._mass = 0.0
        self._error = 0.0

    def add(self, x_MK: Tensor, y_NK: Tensor, num_roundings: int = 0) -> None:
        """Add X Y^T, both float64, each number of which has been rounded so often already.

        Raises `InvalidMixture` when the sum may leave the range of fp32, in which no model could add it.
        """
        added = mass(x_MK, y_NK)
        self._count(x_MK.shape[1], added, gamma(num_roundings) * added)
        self._pending.append((x_MK, y_NK))
        self._num_pending += x_MK.shape[1]
        if self._num_pending >= self._most_pending:
            self._fold()

    def add_dense(self, dense_MN: Tensor) -> None:
        """Add a float64 matrix, which is the accumulator's from now on. Raises `InvalidMixture` like `add`."""
        self._count(1, norm(dense_MN), 0.0)
        self._dense_MN = dense_MN if self._dense_MN is None else self._dense_MN.add_(dense_MN)

    def finish(self) -> WeightedSum:
        """All that was added."""
        if self._dense_MN is None:
            x_MK = torch.cat([x for x, _ in self._pending], dim=1)
            y_NK = torch.cat([y for _, y in self._pending], dim=1)
            return WeightedSum((x_MK, y_NK), None, self._num_terms, self._rounded_up_mass, self._error + _SMALLEST)
        self._fold()
        error = self._error + gamma(self._num_terms + 2) * self._rounded_up_mass + _SMALLEST
        return WeightedSum(None, self._dense_MN, self._num_terms, self._rounded_up_mass, error)

    @property
    def _rounded_up_mass(self) -> float:
        return self._mass * (1 + gamma(self._num_terms + 1))

    @property
    def _most_pending(self) -> int:
        most = crossover(*self._shape)
        return most if self._dense_MN is None else min(most, _FOLDED_COLUMNS)

    def _count(self, num_terms: int, added: float, error: float) -> None:
        self._num_terms += num_terms
        self._mass += added
        self._error += error
        if not self._mass <= _LARGEST:
            raise InvalidMixture(
                f"The mixture's weights and adapters sum up to {self._mass:.3g}; a model can add at most "
                f"{_LARGEST:.3g}: lower the weights."
            )

    def _fold(self) -> None:
        if not self._pending:
            return
        x_MK = torch.cat([x for x, _ in self._pending], dim=1)
        y_NK = torch.cat([y for _, y in self._pending], dim=1)
        if self._dense_MN is None:
            self._dense_MN = x_MK @ y_NK.T
        else:
            self._dense_MN.addmm_(x_MK, y_NK.T)
        self._pending, self._num_pending = [], 0


def weighted_sum(terms: Iterable[tuple[Factors, float]]) -> WeightedSum:
    """sum_i weight_i * scale_i * B_i A_i of one layer; at least one term. Raises `InvalidMixture` beyond fp32's range.

    Takes memory for the matrix at most, however many terms there are: they may be read as they are asked for.
    """
    accumulator: Accumulator | None = None
    for batch in _batches(terms):
        coefficients = [weight * factors.scale for factors, weight in batch for _ in range(factors.rank)]
        # Two roundings: of the coefficient, and of its product with B.
        x_MK = torch.cat([f.b_OR for f, _ in batch], dim=1).double() * torch.tensor(coefficients, dtype=torch.float64)
        y_NK = torch.cat([f.a_RI for f, _ in batch]).double().T
        accumulator = accumulator or Accumulator(len(x_MK), len(y_NK))
        accumulator.add(x_MK, y_NK, num_roundings=2)
    assert accumulator is not None, "a sum of nothing has no shape"
    return accumulator.finish()


def _batches(terms: Iterable[tuple[Factors, float]]) -> Iterator[list[tuple[Factors, float]]]:
    """A few operations on many columns take less time than many on few."""
    batch: list[tuple[Factors, float]] = []
    for factors, weight in terms:
        batch.append((factors, weight))
        if sum(f.rank for f, _ in batch) >= _FOLDED_COLUMNS:
            yield batch
            batch = []
    if batch:
        yield batch
