"""One adapter in memory: the factors of every linear layer it changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cluster.errors import CorruptArtifact, IncompatibleAdapter


@runtime_checkable
class LinearLayer(Protocol):
    """`y = x W^T` plus a bias: an `nn.Linear`, or one whose weight is quantized."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Resident(Protocol):
    """An adapter in the form that some runner reads."""

    @property
    def num_bytes(self) -> int:
        """Its memory."""
        ...


@dataclass(frozen=True, slots=True)
class Factors:
    """The delta of one linear layer: `scale * B @ A`."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Factors by the full name of the layer they change, such as `model.layers.0.self_attn.q_proj`."""

    factors: Mapping[str, Factors]
    base_fingerprint: str
    """The base that the adapter was trained on; it means nothing on any other."""

    @property
    def num_bytes(self) -> int:
        return sum(f.a_RI.nbytes + f.b_OR.nbytes for f in self.factors.values())

    def check_finite(self) -> None:
        """Raise `CorruptArtifact` if any factor or scale is NaN or infinite: it could reach other rows of a batch."""
        for name, f in self.factors.items():
            if not abs(f.scale) <= torch.finfo(torch.float32).max:
                raise CorruptArtifact(f"The adapter's scale for {name} is {f.scale}; expected a number, alpha / r.")
        # The extremes carry NaN along, and finding them takes a tenth of the time of asking each number.
        matrices = [matrix for f in self.factors.values() for matrix in (f.a_RI, f.b_OR)]
        extremes = torch.stack([extreme for matrix in matrices for extreme in torch.aminmax(matrix)])
        finite = torch.isfinite(extremes).view(-1, 4).all(1).tolist()
        for name, is_finite in zip(self.factors, finite, strict=True):
            if not is_finite:
                raise CorruptArtifact(f"The adapter's factors for {name} hold NaN or infinity; train it again.")

    def check_fits(self, layers: Mapping[str, LinearLayer], base_fingerprint: str) -> None:
        """Raise `IncompatibleAdapter` unless the adapter belongs to this base and every factor fits its layer."""
        if self.base_fingerprint != base_fingerprint:
            raise IncompatibleAdapter(
                f"The adapter was trained on base {self.base_fingerprint}, this is base {base_fingerprint}; "
                "train it on this base, or serve the other."
            )
        for name, f in self.factors.items():
            if name not in layers:
                raise IncompatibleAdapter(f"The adapter changes {name}, which this base does not have.")
            out_features, in_features = layers[name].out_features, layers[name].in_features
            if f.a_RI.shape != (f.rank, in_features) or f.b_OR.shape != (out_features, f.rank):
                raise IncompatibleAdapter(
                    f"The adapter's factors for {name} are A {tuple(f.a_RI.shape)}, B {tuple(f.b_OR.shape)}; "
                    f"the layer needs A (r, {in_features}), B ({out_features}, r)."
                )


def adaptable_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Every linear layer of the attention and feed-forward blocks, by full name: what an adapter may change.

    That is each one inside a numbered block, quantized or not; embeddings and the output head lie outside the blocks.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LinearLayer) and any(part.isdecimal() for part in name.split("."))
    }


def replace_layer(model: nn.Module, name: str, layer: object) -> None:
    """Put `layer` where the module of this full name is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
