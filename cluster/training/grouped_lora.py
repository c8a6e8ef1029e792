"""Adapters of many domains over one frozen base, each token through its own domain's factors: the formula of the mixed
batch with weights of 0 and 1, run backwards.

The tokens of a pass lie one after the other, domain by domain, so that a domain's factors meet a stretch of rows and no
others: no mask, no product that is thrown away, and no gradient of one domain that another could reach. Ranks, scales
and layers may differ between domains. Letters: T tokens, I and O widths, R rank, P numbers of one adapter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.errors import InvalidInput
from cluster.lora.weights import AdapterWeights, Factors, LinearLayer, adaptable_layers, replace_layer


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What the adapter of one domain is like."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    """Last parts of the names of the layers it changes, such as `q_proj`; empty for all."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows `start` to `end` of a pass belong to one domain."""

    domain: str
    start: int
    end: int


@dataclass(slots=True)
class _Rows:
    """Whose rows the layers are given now; shared by all of them."""

    stretches: Sequence[Stretch] = ()


@dataclass(frozen=True, slots=True)
class _Trained:
    """One adapter's factors of one layer, and their gradients, which the backward pass adds to."""

    a_RI: Tensor
    b_OR: Tensor
    grad_a_RI: Tensor
    grad_b_OR: Tensor
    scale: float


class _GroupedProduct(torch.autograd.Function):
    """`y = x W^T + bias`, plus `scale * B A x` on each stretch, and backwards without a gradient of W."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, anchor: Tensor, layer: "_GroupedLinear", stretches: Sequence[Stretch]
    ) -> Tensor:
        y_TO = nn.functional.linear(x_TI, layer.weight, layer.bias)
        bottlenecks = []
        for stretch in stretches:
            f = layer.factors[stretch.domain]
            rows = slice(stretch.start, stretch.end)
            h_TR = (x_TI[rows] @ f.a_RI.T.to(x_TI.dtype)).mul_(f.scale)
            y_TO[rows].addmm_(h_TR, f.b_OR.T.to(x_TI.dtype))
            bottlenecks.append(h_TR)
        ctx.layer, ctx.stretches, ctx.bottlenecks = layer, stretches, bottlenecks
        ctx.save_for_backward(x_TI)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x_TI,) = ctx.saved_tensors
        layer: _GroupedLinear = ctx.layer
        dx_TI = dy_TO @ layer.weight if ctx.needs_input_grad[0] else None
        for stretch, h_TR in zip(ctx.stretches, ctx.bottlenecks, strict=True):
            f = layer.factors[stretch.domain]
            rows = slice(stretch.start, stretch.end)
            dh_TR = (dy_TO[rows] @ f.b_OR.to(dy_TO.dtype)).mul_(f.scale)
            _add_product(f.grad_a_RI, dh_TR.T, x_TI[rows])
            _add_product(f.grad_b_OR.T, h_TR.T, dy_TO[rows])
            if dx_TI is not None:
                dx_TI[rows].addmm_(dh_TR, f.a_RI.to(dy_TO.dtype))
        return dx_TI, None, None, None


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """`to += left @ right`; `to` may be of a wider type."""
    if to.dtype == left.dtype:
        to.addmm_(left, right)
    else:
        to += left @ right


class _GroupedLinear(nn.Module):
    """A frozen layer and the factors of the domains that change it."""

    def __init__(self, base: nn.Linear, rows: _Rows, anchor: Tensor) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
        self.factors: dict[str, _Trained] = {}
        self._rows, self._anchor = rows, anchor

    def forward(self, x: Tensor) -> Tensor:
        stretches = [s for s in self._rows.stretches if s.domain in self.factors and s.start < s.end]
        x_TI = x.reshape(-1, x.shape[-1])
        if self._rows.stretches and len(x_TI) != self._rows.stretches[-1].end:
            raise InvalidInput(
                f"A layer of this base was given {len(x_TI)} rows, expected {self._rows.stretches[-1].end}, one for "
                "each token; a base that sends tokens through different layers cannot be adapted in one pass."
            )
        y_TO: Tensor = _GroupedProduct.apply(x_TI, self._anchor, self, stretches)  # type: ignore[no-untyped-call]
        return y_TO.view(*x.shape[:-1], -1)


class GroupedAdapters:
    """One adapter per domain, in place in `model` within `attached()`. Only the factors are trained.

    The gradients lie on `parameter(domain).grad` from the beginning and are added to; whoever steps sets them to zero.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises `InvalidInput` for a base whose weights are not floats."""
        self._model = model
        self._rows = _Rows()
        weight = next(model.parameters())
        self._dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        # Something that asks for a gradient, so that autograd comes by where the layer's input asks for none.
        anchor = torch.zeros((), requires_grad=True, device=weight.device)
        layers = adaptable_layers(model).items()
        self._layers = {name: _grouped(name, layer, self._rows, anchor) for name, layer in layers}
        self._parameters: dict[str, nn.Parameter] = {}

    def add(self, domain: str, shape: AdapterShape, seed: int) -> None:
        """A fresh adapter: as PEFT initialises, A uniform within 1/sqrt(d_in), B zero, so it starts as the plain base.

        It depends on the seed and on the domain's name, not on what else is trained. Raises `InvalidInput` when a
        target is no layer of the base.
        """
        kinds = {name: name.rpartition(".")[2] for name in self._layers}
        if unknown := sorted(set(shape.targets) - set(kinds.values())):
            raise InvalidInput(
                f"The adapter of {domain} is to change {', '.join(unknown)}, which this base lacks; "
                f"its layers are {', '.join(sorted(set(kinds.values())))}."
            )
        chosen = [name for name, kind in kinds.items() if kind in shape.targets or not shape.targets]
        self._place(domain, dict.fromkeys(chosen, (shape.rank, shape.alpha / shape.rank)))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + int.from_bytes(domain.encode()) % 1_000_003)
        for name in chosen:
            a_RI = self._layers[name].factors[domain].a_RI
            bound = 1 / math.sqrt(a_RI.shape[1])
            a_RI.copy_(torch.empty(a_RI.shape).uniform_(-bound, bound, generator=generator))

    def add_weights(self, domain: str, weights: AdapterWeights) -> None:
        """An adapter as it was trained. Raises `IncompatibleAdapter` if it does not fit the base's layers."""
        weights.check_fits({name: layer.base for name, layer in self._layers.items()}, weights.base_fingerprint)
        self._place(domain, {name: (f.rank, f.scale) for name, f in weights.factors.items()})
        for name, f in weights.factors.items():
            self._layers[name].factors[domain].a_RI.copy_(f.a_RI)
            self._layers[name].factors[domain].b_OR.copy_(f.b_OR)

    def _place(self, domain: str, layers: Mapping[str, tuple[int, float]]) -> None:
        """Room for the factors of each layer, of such a rank and scale, as views of one parameter."""
        shapes = {name: (rank, *self._layers[name].weight.shape) for name, (rank, _) in layers.items()}
        size = sum(rank * (outputs + inputs) for rank, outputs, inputs in shapes.values())
        parameter = nn.Parameter(torch.zeros(size, dtype=self._dtype, device=next(self._model.parameters()).device))
        parameter.grad = torch.zeros_like(parameter)
        start = 0
        for name, (rank, outputs, inputs) in shapes.items():
            end = start + rank * (outputs + inputs)
            factors = _factors(parameter.detach()[start:end], rank, inputs)
            gradients = _factors(parameter.grad[start:end], rank, inputs)
            self._layers[name].factors[domain] = _Trained(*factors, *gradients, layers[name][1])
            start = end
        self._parameters[domain] = parameter

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model's layers are these adapters' within, and its own again after."""
        try:
            for name, layer in self._layers.items():
                replace_layer(self._model, name, layer)
            yield
        finally:
            for name, layer in self._layers.items():
                replace_layer(self._model, name, layer.base)

    @contextmanager
    def rows(self, stretches: Sequence[Stretch]) -> Iterator[None]:
        """Within, the layers are given such rows: stretches in order that cover all, or none for the plain base."""
        before, self._rows.stretches = self._rows.stretches, stretches
        try:
            yield
        finally:
            self._rows.stretches = before

    def parameter(self, domain: str) -> nn.Parameter:
        """All factors of one domain, [P]."""
        return self._parameters[domain]

    def weights(self, domain: str, base_fingerprint: str) -> AdapterWeights:
        """A copy of one domain's adapter on the CPU, ready to be published."""
        trained = {name: layer.factors[domain] for name, layer in self._layers.items() if domain in layer.factors}
        copies = {name: Factors(_copy(f.a_RI), _copy(f.b_OR), f.scale) for name, f in trained.items()}
        return AdapterWeights(copies, base_fingerprint)


def _copy(factors: Tensor) -> Tensor:
    return factors.to("cpu", copy=True)


def _grouped(name: str, layer: LinearLayer, rows: _Rows, anchor: Tensor) -> _GroupedLinear:
    if not isinstance(layer, nn.Linear):
        raise InvalidInput(f"The layer {name} of this base is a {type(layer).__name__}; train on the base's floats.")
    return _GroupedLinear(layer, rows, anchor)


def _factors(numbers: Tensor, rank: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] as views; B lies transposed in memory, as products with many rows want it."""
    return numbers[: rank * num_inputs].view(rank, num_inputs), numbers[rank * num_inputs :].view(rank, -1).T
