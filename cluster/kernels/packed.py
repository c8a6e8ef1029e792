"""Weights in the native kernels' layout, whatever they were: float, int8 or int4. Knows nothing of models.

Letters: O output width, I input width, G groups of 32 inputs, B blocks of 16 outputs, N rows.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.kernels import library as native

PLAIN, INT8, INT4 = 0, 8, 4
_OUTPUTS_OF_BLOCK = 16


@dataclass(frozen=True, slots=True)
class RawMatrix:
    """A weight [O, I] before packing."""

    values_OI: Tensor
    """fp32 or bf16; int8; or uint8 [O, I / 2], two int4 plus 8 in a byte, the even input low."""
    scales: Tensor | None = None
    """None; of int8 [O]; of int4 [O, G], each a bf16 number."""

    @property
    def format(self) -> int:
        if self.scales is None:
            return PLAIN
        return INT8 if self.values_OI.dtype == torch.int8 else INT4

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, width = self.values_OI.shape
        return outputs, width * 2 if self.format == INT4 else width


def joined(matrices: list[RawMatrix]) -> RawMatrix:
    """Matrices of the same format that read the same inputs, one below the other."""
    assert len({matrix.format for matrix in matrices}) == 1, "what is joined is of one format"
    if len(matrices) == 1:
        return matrices[0]
    scales = [matrix.scales for matrix in matrices if matrix.scales is not None]
    return RawMatrix(torch.cat([m.values_OI for m in matrices]), torch.cat(scales) if scales else None)


class PackedMatrix:
    """A packed weight, its scales and bias, and the struct that names them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        raw: RawMatrix,
        bias_O: Tensor | None,
        activations: torch.dtype,
        memory: native.LargePages,
    ) -> None:
        """Into `memory`; for inputs of the dtype `activations`: fp32 or bf16, which plain weights have too."""
        self._library = library
        self._activations = activations
        self._is_bf16 = int(activations == torch.bfloat16)
        outputs, inputs = raw.shape
        num_blocks, num_quads = -(-outputs // _OUTPUTS_OF_BLOCK), -(-inputs // 4)
        per_quad = 32 if raw.format == INT4 else 64
        num_bytes = num_blocks * num_quads * per_quad * raw.values_OI.element_size()
        self._weights = memory.take(num_bytes)
        values_OI = raw.values_OI.contiguous()
        library.zephyra_pack(
            values_OI.data_ptr(),
            outputs,
            inputs,
            raw.format,
            self._weights.data_ptr(),
            torch.get_num_threads(),
            self._is_bf16,
        )
        self._scales = _packed_scales(raw)
        self._bias = None if bias_O is None else bias_O.detach().to(torch.float32, copy=True).contiguous()
        self.struct = native.Matrix(
            weights=self._weights.data_ptr(),
            scales=None if self._scales is None else self._scales.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            inputs=inputs,
            outputs=outputs,
            format=raw.format,
        )

    @property
    def num_bytes(self) -> int:
        """Memory of weights, scales and bias."""
        return sum(t.nbytes for t in (self._weights, self._scales, self._bias) if t is not None)

    def rows(self, rows_N: Tensor) -> Tensor:
        """Some rows, unpacked, fp32 [N, I]."""
        rows_N = rows_N.contiguous()
        out_NI = torch.empty(len(rows_N), self.struct.inputs)
        self._library.zephyra_rows(
            ctypes.byref(self.struct),
            rows_N.data_ptr(),
            len(rows_N),
            out_NI.data_ptr(),
            torch.get_num_threads(),
            self._is_bf16,
        )
        return out_NI

    def product(self, x_NI: Tensor) -> Tensor:
        """`x W^T` plus the bias, fp32 [N, O], of inputs in the dtype it was packed for."""
        assert x_NI.dtype == self._activations, "packed for another dtype"
        x_NI = x_NI.contiguous()
        y_NO = torch.empty(len(x_NI), self.struct.outputs)
        self._library.zephyra_product(
            x_NI.data_ptr(),
            len(x_NI),
            ctypes.byref(self.struct),
            y_NO.data_ptr(),
            0,
            torch.get_num_threads(),
            self._is_bf16,
        )
        return y_NO


def _packed_scales(raw: RawMatrix) -> Tensor | None:
    """As the kernels read them: of int8 fp32 [O], of int4 bf16 [B, G, 16]."""
    if raw.scales is None:
        return None
    if raw.format == INT8:
        return raw.scales.to(torch.float32, copy=True)
    missing = -len(raw.scales) % _OUTPUTS_OF_BLOCK
    padded = torch.nn.functional.pad(raw.scales.bfloat16(), (0, 0, 0, missing))
    return padded.view(-1, _OUTPUTS_OF_BLOCK, padded.shape[1]).transpose(1, 2).contiguous()
