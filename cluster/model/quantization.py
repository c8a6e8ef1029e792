"""Quantization after training: the base's matrices as small integers with scales. Knows nothing of files or adapters.

int8: `w[o, i] = values[o, i] * scales[o]`. int4: the same with one scale for each 32 inputs, `scales[o, i // 32]`.
Both are symmetric and need no data. An adapter's product stays beside the matrix and is never merged into it.
Letters: T rows, N token ids, O output width, I input width, G groups of inputs, P bytes of packed inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.config.settings import Quantization
from cluster.errors import CorruptArtifact, InvalidInput

GROUP_INPUTS = 32
"""Inputs that share one scale in int4."""

MAX_PACKED_ROWS = 12
"""Up to so many rows torch's int8 kernel is faster than a dense product after widening the integers (measured)."""

_KERNEL_INPUTS = 32
"""Torch's int8 kernel needs a multiple of its vectors' 8 or 16 numbers as inputs; this is one for either."""

_SHRINK_RATIOS = (1.0, 0.75, 0.82, 0.88, 0.94, 1.06, 1.12)
"""int4 scales that are tried, as shares of the one that reaches a group's largest weight."""

_CHUNK_WEIGHTS = 1 << 20
"""The search for int4 scales works on about so many weights at a time, to stay in the cache."""


def quantize_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Values int8 [O, I] in -127..127 and scales bf16 [O]; no weight is off by more than half its scale."""
    weight_OI = weight_OI.float()
    # A row of zeros has any scale. Rounding a scale to bf16 moves the largest value by a quarter at most.
    scales_O = (weight_OI.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    values_OI = (weight_OI / scales_O.float()[:, None]).round().to(torch.int8)
    return values_OI, scales_O


def quantize_int4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Values int8 [O, I] in -8..7 and scales bf16 [O, G]; I must be a multiple of 32.

    Of several scales each group takes the one of least squared error, so it is never worse than plain rounding. A
    scale may be negative: the largest weight, of either sign, then falls on -8.
    """
    out_features, in_features = weight_OI.shape
    num_rows = max(1, _CHUNK_WEIGHTS // in_features)
    scales_OG = torch.cat([_group_scales(chunk_OI.float()) for chunk_OI in weight_OI.split(num_rows)])
    values_OI = _nearest(_grouped(weight_OI.float()), scales_OG).reshape(out_features, in_features)
    return values_OI.to(torch.int8), scales_OG


def _grouped(weight_OI: Tensor) -> Tensor:
    return weight_OI.reshape(len(weight_OI), -1, GROUP_INPUTS)


def _nearest(groups: Tensor, scales_OG: Tensor) -> Tensor:
    """The nearest of the 16 values, for weights [O, G, 32]."""
    return (groups / scales_OG.float()[..., None]).round().clamp(-8, 7)


def _group_scales(weight_OI: Tensor) -> Tensor:
    """Scales bf16 [O, G] of least squared error: each ratio, and each ratio's least-squares fit, is tried."""
    groups = _grouped(weight_OI)
    extreme_OG = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    best_OG = _usable(extreme_OG / -8)
    least_OG = _squared_error(groups, _nearest(groups, best_OG), best_OG)
    for ratio in _SHRINK_RATIOS:
        tried_OG = _usable(extreme_OG * (ratio / -8))
        values = _nearest(groups, tried_OG)
        fitted_OG = _usable((values * groups).sum(2) / values.square().sum(2).clamp_min(1))
        for candidate_OG in (tried_OG, fitted_OG):
            error_OG = _squared_error(groups, _nearest(groups, candidate_OG), candidate_OG)
            best_OG = torch.where(error_OG < least_OG, candidate_OG, best_OG)
            least_OG = torch.minimum(error_OG, least_OG)
    return best_OG


def _usable(scales_OG: Tensor) -> Tensor:
    """In bf16, and nowhere zero, by which nothing can be divided."""
    tiny = torch.finfo(torch.bfloat16).tiny
    return torch.where(scales_OG.abs() < tiny, tiny, scales_OG).bfloat16()


def _squared_error(groups: Tensor, values: Tensor, scales_OG: Tensor) -> Tensor:
    return (groups - values * scales_OG.float()[..., None]).square().sum(2)


def pack_int4(values_OI: Tensor) -> Tensor:
    """Two to a byte, uint8 [O, I/2]: of byte p the low four bits are value 2p, the high four 2p + 1, each plus 8."""
    shifted_OI = (values_OI + 8).to(torch.uint8)
    return shifted_OI[:, 0::2] | (shifted_OI[:, 1::2] << 4)


def unpack_int4(packed_OP: Tensor) -> Tensor:
    """The inverse of `pack_int4`: int8 [O, I] in -8..7."""
    return torch.stack((packed_OP & 15, packed_OP >> 4), dim=2).flatten(1).to(torch.int8) - 8


def int8_product(x_TI: Tensor, values_OI: Tensor, scales_O: Tensor) -> Tensor:
    """`x W^T` of an int8 matrix, [T, O] in x's dtype.

    A few rows in bf16 on a CPU read the integers as they are; else they are widened, which loses nothing (every int8
    is a bf16), and the scales come after the sum.
    """
    scales_O = scales_O.to(x_TI.dtype)
    is_few_bf16 = x_TI.dtype == torch.bfloat16 and 0 < len(x_TI) <= MAX_PACKED_ROWS
    # Torch's kernel reads whole vectors, beyond the end of rows that are no multiple of them.
    if is_few_bf16 and x_TI.device.type == "cpu" and values_OI.shape[1] % _KERNEL_INPUTS == 0:
        return torch._weight_int8pack_mm(x_TI.contiguous(), values_OI, scales_O)
    return nn.functional.linear(x_TI, values_OI.to(x_TI.dtype)) * scales_O


class QuantizedMatrix(nn.Module):
    """A matrix [O, I] as integers and scales: what a linear layer multiplies by and an embedding looks up.

    Buffers: `values`, row-major, int8 [O, I] for 8 bits or uint8 [O, I/2] as `pack_int4` makes them for 4; `scales`
    [O] or [O, G], each exactly a bf16 number, held in the model's own dtype.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, values: Tensor, scales: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.num_outputs = len(values)
        self.num_inputs = values.shape[1] * (8 // bits)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    @classmethod
    def quantized(cls, weight_OI: Tensor, bits: int) -> "QuantizedMatrix":
        """The nearest to `weight_OI`. Raises `CorruptArtifact` if that holds NaN or infinity."""
        if not torch.isfinite(weight_OI).all():
            raise CorruptArtifact("The base's weights hold NaN or infinity and cannot be quantized; train it again.")
        if bits == 8:
            values, scales = quantize_int8(weight_OI)
        else:
            values, scales = quantize_int4(weight_OI)
            values = pack_int4(values)
        return cls(values, scales.to(weight_OI.dtype), bits)

    @classmethod
    def unfilled(cls, weight_OI: Tensor, bits: int) -> "QuantizedMatrix":
        """One for a weight of this shape, dtype and device, its numbers still to be loaded."""
        out_features, in_features = weight_OI.shape
        packed = in_features if bits == 8 else in_features // 2
        values = weight_OI.new_empty(out_features, packed, dtype=torch.int8 if bits == 8 else torch.uint8)
        shape = (out_features,) if bits == 8 else (out_features, in_features // GROUP_INPUTS)
        return cls(values, weight_OI.new_empty(shape), bits)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix these integers stand for, [O, I]: exact in fp32, rounded once in bf16."""
        if self.bits == 8:
            return (self.values * self.scales.float()[:, None]).to(dtype)
        groups = _grouped(unpack_int4(self.values))
        return (groups * self.scales.float()[..., None]).flatten(1).to(dtype)

    def rows(self, ids_N: Tensor) -> Tensor:
        """The rows of an int8 matrix, [N, I] in the model's dtype; `ids_N` may have any shape."""
        assert self.bits == 8, "embeddings are int8"
        return self.values[ids_N] * self.scales[ids_N].unsqueeze(-1)

    def product(self, x: Tensor) -> Tensor:
        """`x W^T`, [..., O] in x's dtype."""
        if self.bits == 4:
            return nn.functional.linear(x, self.dequantized(x.dtype))
        x_TI = x.reshape(-1, self.num_inputs)
        return int8_product(x_TI, self.values, self.scales).view(*x.shape[:-1], self.num_outputs)


class QuantizedLinear(nn.Module):
    """A linear layer over a quantized matrix; its bias, if it has one, stays as it was."""

    def __init__(self, matrix: QuantizedMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = bias
        self.in_features, self.out_features = matrix.num_inputs, matrix.num_outputs

    def dequantized(self) -> Tensor:
        """The weight that this layer stands for, fp32 [O, I]."""
        return self.matrix.dequantized()

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        y = self.matrix.product(x)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """Token embeddings over a quantized matrix, which a tied head shares."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.num_outputs, matrix.num_inputs

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of any shape to vectors, in the model's dtype."""
        return self.matrix.rows(ids)


MakeMatrix = Callable[[Tensor, int], QuantizedMatrix]
"""A matrix for a weight [O, I], with so many bits."""


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel, quantization: Quantization, make_matrix: MakeMatrix = QuantizedMatrix.quantized
) -> None:
    """Replace the linear layers and embeddings of `model` in place by quantized ones; norms and biases stay.

    Embeddings and head are int8 either way, one matrix when they are tied; so is a layer whose input is no multiple of
    32. Raises `InvalidInput` for a model whose layers compute more than a product or a look-up.
    """
    _check_plain(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding), "a language model looks its tokens up"
    looked_up = QuantizedEmbedding(make_matrix(embedding.weight, 8))
    tied = head.weight is embedding.weight
    for name, module in list(model.named_modules()):
        if module is embedding:
            replacement: nn.Module = looked_up
        elif module is head:
            replacement = QuantizedLinear(looked_up.matrix if tied else make_matrix(head.weight, 8), head.bias)
        elif isinstance(module, nn.Linear):
            bits = 4 if quantization == "int4" and module.in_features % GROUP_INPUTS == 0 else 8
            replacement = QuantizedLinear(make_matrix(module.weight, bits), module.bias)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)


def _check_plain(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and type(module) not in (nn.Linear, nn.Embedding):
            raise InvalidInput(
                f"{name} is a {type(module).__name__}, of which only the base's own code knows what it computes; "
                "quantize a base of plain linear layers and embeddings, or serve this one as it is."
            )
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise InvalidInput("This base is quantized already; quantize the one it was made of.")


def weight_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def num_weights(model: nn.Module) -> int:
    """Parameters of a model, quantized ones included, shared ones once."""
    matrices = [module for module in model.modules() if isinstance(module, QuantizedMatrix)]
    return sum(p.numel() for p in model.parameters()) + sum(m.num_outputs * m.num_inputs for m in matrices)
