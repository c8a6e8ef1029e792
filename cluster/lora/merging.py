"""Merging a mixture of many adapters into one of low rank, with a bound on its distance from the exact sum.

Each shard reduces its share to a `Part`; parts are joined, in any tree, and at last merged into an adapter that is
cached and served like any other. Whoever drops or rounds something measures what that was, and all that was lost adds
up (triangle inequality): the certificate covers everything between the adapters' own numbers and those served.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.errors import IncompatibleAdapter
from cluster.lora.certificate import Certificate, in_total
from cluster.lora.merge_plan import Method, crossover, travels_as_matrix
from cluster.lora.parts import Array, LayerPart, Part
from cluster.lora.truncation import balanced, power_of_two, truncated
from cluster.lora.weighted_sum import Accumulator, WeightedSum, norm, weighted_sum
from cluster.lora.weights import AdapterWeights, Factors
from cluster.messages import AdapterRef, Mixture

_MERGED_PREFIX = "~"
"""No domain that can be published or asked for begins so."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged mixture as an adapter, and what is certain of it. It travels as `peft_format.packed(weights)`."""

    weights: AdapterWeights
    certificates: Mapping[str, Certificate]
    """By layer."""

    @property
    def certificate(self) -> Certificate:
        """Of all layers together."""
        return in_total(self.certificates.values())


def merged_ref(mixture: Mixture, rank: int, dtype: torch.dtype) -> AdapterRef:
    """What a mixture merged to `rank` for models of `dtype` is called: equal mixtures, equal names."""
    digest = hashlib.blake2b(f"{mixture.key} {dtype}".encode(), digest_size=20).hexdigest()
    return AdapterRef(_MERGED_PREFIX + digest, rank)


def is_merged(ref: AdapterRef) -> bool:
    """Whether `ref` was made by `merged_ref`."""
    return ref.domain.startswith(_MERGED_PREFIX)


def share_sums(
    adapters: Sequence[AdapterWeights], weights: Sequence[float], layers: Sequence[str] | None = None
) -> Iterator[tuple[str, WeightedSum]]:
    """The weighted sum of each layer that any of the adapters changes, or of those of `layers`, one after the other.

    Raises `IncompatibleAdapter` when the adapters are of several bases, `InvalidMixture` like `weighted_sum`.
    """
    fingerprint_of([adapter.base_fingerprint for adapter in adapters])
    for name in _names(adapters) if layers is None else layers:
        terms = [(a.factors[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.factors]
        if terms:
            yield name, weighted_sum(terms)


def reduce_share(
    adapters: Sequence[AdapterWeights],
    weights: Sequence[float],
    most_columns: int | None = None,
    layers: Sequence[str] | None = None,
    dense: Collection[str] = (),
) -> Part:
    """One shard's share of a mixture; at least one adapter. Raises like `share_sums`.

    A layer is factors of at most `most_columns` columns or, where that is smaller, a matrix; without `most_columns`
    nothing is dropped. The plan names as `dense` the layers that become matrices at the coordinator anyway. A caller
    short of memory takes the `layers` in groups: a group's matrices are in memory at once.
    """
    parts = {}
    for name, total in share_sums(adapters, weights, layers):
        is_dense = name in dense and travels_as_matrix(*total.shape, total.columns)
        parts[name] = _part(total.as_matrix() if is_dense else total, 0.0, most_columns)
    return Part(parts, adapters[0].base_fingerprint)


def join_parts(parts: Sequence[Part], most_columns: int | None = None) -> Part:
    """Several parts as one, on the way to the root of a tree. Raises like `reduce_share`."""
    fingerprint = fingerprint_of([part.base_fingerprint for part in parts])
    joined = {name: _part(*_joined(name, parts), most_columns) for name in _part_names(parts)}
    return Part(joined, fingerprint)


def merge_parts(parts: Sequence[Part], rank: int, dtype: torch.dtype) -> Merged:
    """The adapter of rank at most `rank` for a model that computes in `dtype`, from the parts of all shards.

    No adapter of this rank is nearer to the parts' sum, but for rounding. Raises like `reduce_share`.
    """
    fingerprint = fingerprint_of([part.base_fingerprint for part in parts])
    factors, certificates = {}, {}
    for name in _part_names(parts):
        total, lost = _joined(name, parts)
        method = Method.QR_SVD if total.factors is not None else Method.DENSE_SUM
        factors[name], certificates[name] = served(total, lost, method, *truncated(total, rank), dtype)
    return Merged(AdapterWeights(factors, fingerprint), certificates)


def joined_layers(merged: Sequence[Merged]) -> Merged:
    """Groups of layers that were merged by themselves, as one. Raises `IncompatibleAdapter` for several bases."""
    fingerprint = fingerprint_of([group.weights.base_fingerprint for group in merged])
    factors = {name: f for group in merged for name, f in group.weights.factors.items()}
    certificates = {name: c for group in merged for name, c in group.certificates.items()}
    return Merged(AdapterWeights(factors, fingerprint), certificates)


def served(
    total: WeightedSum, lost: float, method: Method, left_MR: Tensor, right_NR: Tensor, dtype: torch.dtype
) -> tuple[Factors, Certificate]:
    """`left @ right.T` as factors in `dtype`, certified against `total`, to which `lost` comes."""
    left_MR, right_NR, scale = balanced(left_MR, right_NR)
    factors = Factors(right_NR.T.to(dtype).contiguous(), left_MR.to(dtype), scale)
    b_MR, a_NR = factors.b_OR.double() * scale, factors.a_RI.double().T
    bound = (total.distance(b_MR, a_NR) + lost) * (1 + 1e-12)
    return factors, Certificate(method.value, factors.rank, bound, product_norm(b_MR, a_NR))


def product_norm(left_MR: Tensor, right_NR: Tensor) -> float:
    """The Frobenius norm of `left @ right.T`."""
    return float(((left_MR.T @ left_MR) * (right_NR.T @ right_NR)).sum().clamp(min=0).sqrt())


def fingerprint_of(fingerprints: Sequence[str]) -> str:
    """The one base of all. Raises `IncompatibleAdapter` if there are several."""
    found = sorted(set(fingerprints))
    if len(found) != 1:
        raise IncompatibleAdapter(
            f"The mixture's adapters were trained on bases {', '.join(found) or 'unknown'}; expected one base: publish "
            "all of them for the base that is served."
        )
    return found[0]


def as_array(x: Tensor) -> Array:
    """Rounded to fp32, to be read only."""
    array: Array = x.to(torch.float32).contiguous().numpy()
    array.flags.writeable = False
    return array


def as_tensor(array: Array) -> Tensor:
    """In float64, as a copy."""
    return torch.from_numpy(array.astype(np.float64))


def _part(total: WeightedSum, lost: float, most_columns: int | None) -> LayerPart:
    """`total` as it travels; what that loses is measured and comes to `lost`."""
    num_out, num_in = total.shape
    columns = min((c for c in (total.columns, most_columns) if c is not None), default=num_out * num_in)
    if columns >= crossover(num_out, num_in):
        return _dense_part(total, lost)
    is_whole = total.columns == columns
    left_MC, right_NC, scale = balanced(*truncated(total, columns))
    left, right = as_array(left_MC), as_array(right_NC)
    read_left_MC, read_right_NC = as_tensor(left), as_tensor(right)
    if is_whole and torch.equal(read_left_MC, left_MC) and torch.equal(read_right_NC, right_NC):
        return LayerPart((left, right), None, scale, lost + total.error)
    return LayerPart((left, right), None, scale, lost + total.distance(read_left_MC * scale, read_right_NC))


def _dense_part(total: WeightedSum, lost: float) -> LayerPart:
    assert total.dense_MN is not None, "factors that are no smaller than the matrix"
    scale = power_of_two(float(total.dense_MN.abs().max()))
    dense_MN = total.dense_MN / scale
    array = as_array(dense_MN)
    rounding = norm(dense_MN.sub_(as_tensor(array))) * scale
    return LayerPart(None, array, scale, lost + total.error + rounding)


def _joined(name: str, parts: Sequence[Part]) -> tuple[WeightedSum, float]:
    """The sum of all parts of a layer, and what they lost together."""
    layers = [part.layers[name] for part in parts if name in part.layers]
    first = layers[0]
    accumulator = Accumulator(*_shape(first))
    for layer in layers:
        if layer.dense_MN is not None:
            accumulator.add_dense(as_tensor(layer.dense_MN) * layer.scale)
        else:
            assert layer.factors is not None
            left_MC, right_NC = layer.factors
            accumulator.add(as_tensor(left_MC) * layer.scale, as_tensor(right_NC))
    return accumulator.finish(), sum(layer.lost for layer in layers) * (1 + 1e-12)


def _shape(layer: LayerPart) -> tuple[int, int]:
    if layer.dense_MN is not None:
        return layer.dense_MN.shape[0], layer.dense_MN.shape[1]
    assert layer.factors is not None
    return len(layer.factors[0]), len(layer.factors[1])


def _part_names(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part.layers))


def _names(adapters: Sequence[AdapterWeights]) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.factors))
