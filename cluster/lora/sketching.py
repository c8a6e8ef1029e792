"""Merging by sketch, for so many adapters in so wide layers that their factors and their sum are too large to travel.

The coordinator never sees the sum D. From products with a few columns that each shard computes of its share D_s, and
that the coordinator adds up, it learns a range Q that holds nearly all of D (Halko, Martinsson and Tropp 2011,
arXiv 0909.4061; the blocks of all powers are kept, as in Musco and Musco 2015, arXiv 1504.05477). Then it asks for
Z = Q^T D, and truncates that:

    Sketch       Y_0 = D_s Omega
    Multiply     D_s^T Y_0, made orthonormal: P_1; Y_1 = D_s P_1; so on, `POWERS` times; P = [P_1, P_2]
    Project      Z_s = Q^T D_s, with Q = orthonormal([Y_0, Y_1, Y_2]), G_s = (D_s - Q Z_s) P, and what these leave

Since D P lies in Q, the G_s cancel, and D = Q Z + sum_s R_s, R_s = D_s - Q Z_s - G_s P^T: what a share has outside both
ranges. The bound is the norm of sum_s ||R_s|| and of the part of Q Z that is left out, and what the cast costs on top.
For one shard that is the true error, for S independent ones at most about sqrt(S) times it. The seed says Omega; a
shard whose library drew other numbers from it would make a worse merge, never a wrong bound.

Letters as in `weighted_sum`, but for a layer with more outputs than inputs D is turned: M is the smaller side, N the
greater. J columns of P.
"""

import math
import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.lora.merge_plan import POWERS, Method, sketch_widths
from cluster.lora.merging import Merged, as_array, as_tensor, served
from cluster.lora.parts import Array, LayerProjection, Scaled
from cluster.lora.truncation import power_of_two
from cluster.lora.weighted_sum import Accumulator, WeightedSum, gamma, norm
from cluster.lora.weights import AdapterWeights

Sums = Mapping[str, WeightedSum]
"""A shard's share by layer, as `merging.share_sums` gives them; the shard keeps them from ask to ask."""

Products = Mapping[str, Scaled]
Projections = Mapping[str, LayerProjection]
Answer = Products | Projections


@dataclass(frozen=True, slots=True)
class Sketch:
    """Asks for each share times a random matrix."""

    rank: int
    seed: int

    def answer(self, sums: Sums) -> Products:
        """[M, L] of each layer."""
        return {name: self._sketched(name, _turned(total)) for name, total in sums.items()}

    def _sketched(self, name: str, total: WeightedSum) -> Scaled:
        columns, _ = sketch_widths(*total.shape, self.rank)
        generator = np.random.Generator(np.random.Philox([self.seed, zlib.crc32(name.encode())]))
        omega_NL = torch.from_numpy(generator.standard_normal((total.shape[1], columns)))
        return _scaled(total.times(omega_NL))


@dataclass(frozen=True, slots=True)
class Multiply:
    """Asks for each share, or its transpose, times a matrix."""

    by: Mapping[str, Array]
    is_transposed: bool

    def answer(self, sums: Sums) -> Products:
        """[M, L] of each layer, transposed [N, L]."""
        return {name: self._multiplied(_turned(total), as_tensor(self.by[name])) for name, total in sums.items()}

    def _multiplied(self, total: WeightedSum, by: Tensor) -> Scaled:
        return _scaled(total.transposed_times(by) if self.is_transposed else total.times(by))


@dataclass(frozen=True, slots=True)
class Project:
    """Asks for what each share has in the range Q, and how much it has outside of Q and P."""

    q_ML: Mapping[str, Array]
    p_NJ: Mapping[str, Array]

    def answer(self, sums: Sums) -> Projections:
        """Of each layer."""
        return {n: _projected(total, as_tensor(self.q_ML[n]), as_tensor(self.p_NJ[n])) for n, total in sums.items()}


def _projected(total: WeightedSum, q_ML: Tensor, p_NJ: Tensor) -> LayerProjection:
    turned = _turned(total)
    exact_NL = turned.transposed_times(q_ML)
    z = _scaled(exact_NL)
    z_NL = _read(z)
    g = _scaled(turned.times(p_NJ) - q_ML @ (z_NL.T @ p_NJ))
    g_MJ = _read(g)
    residual = turned.distance(torch.cat([q_ML, g_MJ], dim=1), torch.cat([z_NL, p_NJ], dim=1))
    # Q^T R = (Q^T D - Z) + (I - Q^T Q) Z - Q^T G P^T.
    num_roundings = turned.num_terms + sum(turned.shape) + 4
    rounding = (gamma(num_roundings) * turned.mass + turned.error) * norm(q_ML)
    of_g = norm(q_ML.T @ g_MJ) + gamma(len(q_ML)) * norm(q_ML) * norm(g_MJ)
    overlap = rounding + norm(exact_NL - z_NL) + _skew(q_ML) * norm(z_NL) + of_g * (1 + _skew(p_NJ))
    return LayerProjection(z, g, turned is not total, residual, overlap)


Ask = Sketch | Multiply | Project


def merge_by_sketch(
    base_fingerprint: str, rank: int, dtype: torch.dtype, seed: int
) -> Generator[Ask, Sequence[Answer], Merged]:
    """The coordinator's side: yields what to ask all shards, is sent their answers, returns what is merged.

    `base_fingerprint` is that of all shards' adapters, which the caller has compared.
    """
    blocks = [_add_up((yield Sketch(rank, seed)))]
    p_NJ: dict[str, Tensor] = {}
    for _ in range(POWERS):
        products = _add_up((yield Multiply(_arrays(_orthonormal([blocks[-1]])), is_transposed=True)))
        new = {name: _beside(p_NJ.get(name), product) for name, product in products.items()}
        p_NJ = {name: torch.cat([p_NJ[name], p], dim=1) if name in p_NJ else p for name, p in new.items()}
        blocks.append(_add_up((yield Multiply(_arrays(new), is_transposed=False))))
    ask = Project(_arrays(_orthonormal(blocks)), _arrays(p_NJ))
    answers = yield ask
    factors, certificates = {}, {}
    for name, q_ML in ask.q_ML.items():
        of_layer = _checked([answer[name] for answer in answers if name in answer])
        merged = _merged(of_layer, as_tensor(q_ML), as_tensor(ask.p_NJ[name]), rank)
        factors[name], certificates[name] = served(*merged, dtype)
    return Merged(AdapterWeights(factors, base_fingerprint), certificates)


def _merged(
    projections: Sequence[LayerProjection], q_ML: Tensor, p_NJ: Tensor, rank: int
) -> tuple[WeightedSum, float, Method, Tensor, Tensor]:
    """The sum's nearest factors in the range, what it has beyond these, and what `served` takes besides."""
    z_SNL = torch.stack([_read(projection.z_NL) for projection in projections])
    g_MJ = torch.stack([_read(projection.g_MJ) for projection in projections]).sum(dim=0)
    z_NL = z_SNL.sum(dim=0)
    w_LR = torch.linalg.svd(z_NL, full_matrices=False).Vh[:rank].T
    left_MR, right_NR = q_ML @ w_LR, z_NL @ w_LR
    # Q W W^T Z is served of Q Z; what that leaves lies in Q, and R is orthogonal to Q but for rounding.
    left_out = norm(z_NL - right_NR @ w_LR.T)
    outside = sum(projection.residual for projection in projections)
    overlap = sum(projection.overlap for projection in projections)
    squares = outside**2 + (1 + _skew(q_ML)) * left_out**2 + 2 * overlap * left_out
    uncancelled = norm(g_MJ) * (1 + _skew(p_NJ))
    size = sum(norm(z_of_shard_NL) for z_of_shard_NL in z_SNL) + sum(norm(_read(p.g_MJ)) for p in projections)
    rounding = 8 * gamma(len(w_LR) + len(projections) + 8) * norm(q_ML) * (1 + norm(w_LR) ** 2) * size
    lost = (math.sqrt(squares) + uncancelled + rounding) * (1 + 1e-12)
    left, right = (right_NR, left_MR) if projections[0].is_turned else (left_MR, right_NR)
    accumulator = Accumulator(len(left), len(right))
    accumulator.add(left, right)
    return accumulator.finish(), lost, Method.RANDOMIZED, left, right


def _checked(answers: Sequence[Scaled | LayerProjection]) -> list[LayerProjection]:
    assert all(isinstance(answer, LayerProjection) for answer in answers), "the answer to another ask"
    return [answer for answer in answers if isinstance(answer, LayerProjection)]


def _turned(total: WeightedSum) -> WeightedSum:
    num_out, num_in = total.shape
    return total if num_out <= num_in else total.transposed


def _scaled(x: Tensor) -> Scaled:
    scale = power_of_two(float(x.abs().max())) if x.numel() else 1.0
    return Scaled(as_array(x / scale), scale)


def _read(scaled: Scaled) -> Tensor:
    return as_tensor(scaled.array) * scaled.scale


def _skew(q_ML: Tensor) -> float:
    """At least || I - Q^T Q ||_F: nothing but rounding."""
    gram_LL = q_ML.T @ q_ML
    gram_LL.diagonal().sub_(1)
    return norm(gram_LL) + gamma(len(q_ML) + 4) * norm(q_ML) ** 2


def _add_up(products: Sequence[Answer]) -> dict[str, Tensor]:
    """The sum of all shards' products, by layer."""
    total: dict[str, Tensor] = {}
    for of_shard in products:
        for name, scaled in of_shard.items():
            assert isinstance(scaled, Scaled), "the answer to another ask"
            total[name] = total[name] + _read(scaled) if name in total else _read(scaled)
    return total


def _orthonormal(blocks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """An orthonormal basis of what the blocks of a layer span together."""
    return {name: torch.linalg.qr(torch.cat([block[name] for block in blocks], dim=1)).Q for name in blocks[0]}


def _beside(p_NJ: Tensor | None, x_NL: Tensor) -> Tensor:
    """An orthonormal basis of what `x` adds to what the orthonormal `p` spans, rounded as it travels."""
    if p_NJ is None:
        return as_tensor(as_array(torch.linalg.qr(x_NL).Q))
    return as_tensor(as_array(torch.linalg.qr(torch.cat([p_NJ, x_NL], dim=1)).Q[:, p_NJ.shape[1] :]))


def _arrays(of_layers: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: as_array(x) for name, x in of_layers.items()}
