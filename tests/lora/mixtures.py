"""Mixtures of one layer to be merged, drawn with all that makes merging hard, and their exact sums."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.lora.weights import AdapterWeights, Factors

LAYER = "model.layers.0.self_attn.q_proj"
FINGERPRINT = "0123456789abcdef"

SHAPES = [(9, 14), (24, 10), (16, 16), (1, 7), (40, 40)]
KINDS = ["random", "zero", "duplicate", "deficient", "ill"]
WEIGHTS = [0.0, 1 / 64, 0.25, 0.3, 1.0, 3.0]


@dataclass(frozen=True, slots=True)
class Case:
    """A mixture of one layer and on which shard each of its adapters lies."""

    adapters: list[AdapterWeights]
    weights: list[float]
    shard_of: list[int]

    @property
    def exact(self) -> NDArray[np.longdouble]:
        """The sum in extended precision, whose rounding is nothing beside that of float64."""
        return exact_sum(self.adapters, self.weights)

    @property
    def shares(self) -> list[tuple[list[AdapterWeights], list[float]]]:
        """Adapters and weights of each shard that has any."""
        found = []
        for shard in sorted(set(self.shard_of)):
            of_shard = [index for index, other in enumerate(self.shard_of) if other == shard]
            found.append(([self.adapters[index] for index in of_shard], [self.weights[index] for index in of_shard]))
        return found


def exact_sum(adapters: Sequence[AdapterWeights], weights: Sequence[float]) -> NDArray[np.longdouble]:
    """sum_i w_i s_i B_i A_i of `LAYER`."""
    return sum(
        np.longdouble(weight) * np.longdouble(f.scale) * (_extended(f.b_OR) @ _extended(f.a_RI))
        for f, weight in zip((a.factors[LAYER] for a in adapters), weights, strict=True)
    )


def served_delta(weights: AdapterWeights, layer: str = LAYER) -> NDArray[np.longdouble]:
    """What a model adds that serves `weights`."""
    f = weights.factors[layer]
    return np.longdouble(f.scale) * (_extended(f.b_OR) @ _extended(f.a_RI))


def frobenius(x: NDArray[np.longdouble]) -> float:
    """Its norm, of numbers of any size."""
    return float(np.sqrt((x * x).sum()))


def optimum(x: NDArray[np.longdouble], rank: int) -> float:
    """The distance to the nearest matrix of this rank (Eckart and Young)."""
    return frobenius(np.linalg.svd(x.astype(np.float64), compute_uv=False)[rank:].astype(np.longdouble))


def adapter(a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float = 1.0) -> AdapterWeights:
    """One that changes `LAYER` only."""
    return AdapterWeights({LAYER: Factors(a_RI, b_OR, scale)}, FINGERPRINT)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One to eight adapters of any kind, size, rank and scale, on one to four shards."""
    num_out, num_in = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    size = draw(st.sampled_from([1.0, 1.0, 1e-3, 10.0] if dtype is torch.float16 else [1.0, 1.0, 1e-15, 1e12]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    adapters: list[AdapterWeights] = []
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=8)):
        rank = draw(st.integers(1, 8))
        a_RI = torch.randn(rank, num_in, generator=generator)
        b_OR = torch.randn(num_out, rank, generator=generator) * size
        if kind == "zero":
            b_OR = torch.zeros_like(b_OR)
        elif kind == "deficient":
            a_RI[1:] = a_RI[0]
        elif kind == "ill":
            b_OR = b_OR * torch.logspace(0, -12, rank)
        alpha = draw(st.sampled_from([1.0, 16.0, 7.0]))
        scale = draw(st.sampled_from([alpha / rank, alpha / rank**0.5]))
        if kind == "duplicate" and adapters:
            adapters.append(adapters[-1])
        else:
            adapters.append(adapter(a_RI.to(dtype), b_OR.to(dtype), scale))
    weights = [draw(st.sampled_from(WEIGHTS)) for _ in adapters]
    return Case(adapters, weights, [draw(st.integers(0, 3)) for _ in adapters])


def _extended(x: torch.Tensor) -> NDArray[np.longdouble]:
    return x.double().numpy().astype(np.longdouble)
