"""Which way of merging a layer costs least: a model of flops and bytes, and nothing else.

S shards hold K_s columns each (ranks of their adapters, summed) of a layer of M outputs and N inputs. Three ways:

- `QR_SVD`: factors travel, (M + N) K_s numbers a shard, and are truncated once, by QR and a small SVD;
- `DENSE_SUM`: each shard's sum travels as a matrix, M N numbers however many adapters there are;
- `RANDOMIZED`: products with a sketch of L columns travel, (M + N) L numbers a round (Halko, Martinsson and Tropp 2011,
  arXiv 0909.4061; all blocks are kept, as Musco and Musco 2015, arXiv 1504.05477, do).

The first two are exact. The third is nearly as near the exact sum, but what it certifies is looser by up to sqrt(S), so
that it must be worth it. Flops are those of Golub and Van
Loan, "Matrix computations"; what the slower ones weigh was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

_BYTES = 4
"""Of a number that travels."""

EXTRA_COLUMNS = 8
"""A sketch has so many columns more than the rank that is asked for."""

POWERS = 2
"""A sketch is multiplied so often by the sum's transpose and the sum: within 1 % of the optimum on flat spectra too."""

_WORTH_FORMING = 8

_QR_SLOWNESS, _SVD_FLOPS, _EIGEN_FLOPS = 2, 22, 9


def crossover(out_features: int, in_features: int) -> int:
    """The number of columns from which on factors are no smaller than the matrix, m n / (m + n)."""
    return -(-out_features * in_features // (out_features + in_features))


def travels_as_matrix(out_features: int, in_features: int, columns: int | None) -> bool:
    """Whether a share of a layer whose sum becomes a matrix anyway is formed by the shard; None where it already was.

    Up to `_WORTH_FORMING` times the bytes are less than what the coordinator would compute, all shards' in turn.
    """
    return columns is None or columns * _WORTH_FORMING >= crossover(out_features, in_features)


class Method(Enum):
    """A way of merging one layer."""

    QR_SVD = "qr_svd"
    DENSE_SUM = "dense_sum"
    RANDOMIZED = "randomized"


@dataclass(frozen=True, slots=True)
class LayerShares:
    """What the shards hold of one layer."""

    out_features: int
    in_features: int
    columns: tuple[int, ...]
    """Of each shard that has any."""

    @property
    def numbers(self) -> int:
        """Of the layer's matrix."""
        return self.out_features * self.in_features

    @property
    def sides(self) -> int:
        """Numbers of one column of its factors."""
        return self.out_features + self.in_features


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan reckons with: a core and a network as they are common."""

    flops_per_s: float = 2e10
    bytes_per_s: float = 1e9
    """Into the coordinator, which all shards share."""
    round_trip_s: float = 2e-3


@dataclass(frozen=True, slots=True)
class Cost:
    """Of merging one layer in one way."""

    shard_flops: float
    """Of the shard that has most to do: they work at the same time."""
    coordinator_flops: float
    num_bytes: int
    """To and from the coordinator, of all shards."""
    rounds: int

    def seconds(self, machine: Machine) -> float:
        """One after the other: shards, network, coordinator."""
        flops_s = (self.shard_flops + self.coordinator_flops) / machine.flops_per_s
        return flops_s + self.num_bytes / machine.bytes_per_s + self.rounds * machine.round_trip_s


def plan(shares: Sequence[Mapping[str, LayerShares]], rank: int, machine: Machine = Machine()) -> dict[str, Method]:
    """The way of each layer that any shard holds something of, from what each shard says it holds."""
    layers: dict[str, LayerShares] = {}
    for of_shard in shares:
        for name, of_layer in of_shard.items():
            columns = (*layers[name].columns, *of_layer.columns) if name in layers else of_layer.columns
            layers[name] = replace(of_layer, columns=columns)
    return {name: choose(of_layer, rank, machine) for name, of_layer in layers.items()}


def exact_method(shares: LayerShares) -> Method:
    """The exact way: by factors while all of them together are smaller than the matrix."""
    is_small = sum(shares.columns) < crossover(shares.out_features, shares.in_features)
    return Method.QR_SVD if is_small else Method.DENSE_SUM


def choose(shares: LayerShares, rank: int, machine: Machine = Machine(), advantage: float = 2.0) -> Method:
    """The exact way, or `RANDOMIZED` where that is `advantage` times as fast and the rank leaves something out."""
    exact = exact_method(shares)
    if rank + EXTRA_COLUMNS >= min(shares.out_features, shares.in_features, sum(shares.columns)):
        return exact
    exact_s = cost(exact, shares, rank).seconds(machine)
    return Method.RANDOMIZED if cost(Method.RANDOMIZED, shares, rank).seconds(machine) * advantage <= exact_s else exact


def cost(method: Method, shares: LayerShares, rank: int) -> Cost:
    """What merging a layer to `rank` takes in this way, its certificate included."""
    return {Method.QR_SVD: _by_factors, Method.DENSE_SUM: _by_matrix, Method.RANDOMIZED: _by_sketch}[method](
        shares, rank
    )


def _by_factors(shares: LayerShares, rank: int) -> Cost:
    sides, total = shares.sides, sum(shares.columns)
    truncation = 0
    if total > rank:
        truncation = _QR_SLOWNESS * 4 * sides * total**2 + _SVD_FLOPS * total**3 + 2 * sides * total * rank
    certificate = min(2 * shares.numbers * (total + rank), _QR_SLOWNESS * 2 * sides * (total + rank) ** 2)
    return Cost(0, truncation + certificate, _BYTES * sides * total, rounds=1)


def _by_matrix(shares: LayerShares, rank: int) -> Cost:
    numbers, short = shares.numbers, min(shares.out_features, shares.in_features)
    shape = shares.out_features, shares.in_features
    as_factors = [columns for columns in shares.columns if not travels_as_matrix(*shape, columns)]
    as_matrix = [columns for columns in shares.columns if travels_as_matrix(*shape, columns)]
    adding = numbers * (len(as_matrix) + 2 * sum(as_factors))
    truncation = 2 * numbers * short + _EIGEN_FLOPS * short**3 + 2 * numbers * rank
    num_bytes = _BYTES * (numbers * len(as_matrix) + shares.sides * sum(as_factors))
    forming = 2 * numbers * max(as_matrix, default=0)
    return Cost(forming, adding + truncation + 2 * numbers * rank, num_bytes, rounds=1)


def _by_sketch(shares: LayerShares, rank: int) -> Cost:
    numbers, sides, most = shares.numbers, shares.sides, max(shares.columns)
    short, long = sorted((shares.out_features, shares.in_features))
    columns, width = sketch_widths(shares.out_features, shares.in_features, rank)
    right_width = POWERS * columns
    is_matrix = most >= crossover(long, short)
    forming = 2 * numbers * most if is_matrix else 0
    per_column = 2 * numbers if is_matrix else 2 * sides * most
    products = (2 * POWERS + 1) * columns + width + right_width
    what_is_left = 2 * numbers * (width + right_width + (0 if is_matrix else most))
    between_ranges = 2 * (sides + short) * width * right_width + 2 * (short * width**2 + long * right_width**2)
    orthogonal = _QR_SLOWNESS * 4 * (POWERS * sides * columns**2 + short * width**2)
    finish = _QR_SLOWNESS * 4 * long * width**2 + _SVD_FLOPS * width**3 + 2 * numbers * rank
    # Up: the products, then Z and G. Down: a range for each power on each side, then all of them together, Q and P.
    on_short = (2 * POWERS + 1) * columns + width + right_width
    on_long = 2 * POWERS * columns + width + right_width
    return Cost(
        forming + per_column * products + what_is_left + between_ranges,
        orthogonal + finish,
        _BYTES * (short * on_short + long * on_long) * len(shares.columns),
        rounds=2 * POWERS + 2,
    )


def sketch_widths(out_features: int, in_features: int, rank: int) -> tuple[int, int]:
    """Columns of the sketch, and of the range that it and its powers give together."""
    short = min(out_features, in_features)
    columns = min(rank + EXTRA_COLUMNS, short)
    return columns, min((POWERS + 1) * columns, short)
