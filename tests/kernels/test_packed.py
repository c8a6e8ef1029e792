"""Packed matrices against plain products: every format, any number of rows, any shape; and row by row the same bits."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kernels.library import LargePages
from cluster.kernels.packed import PackedMatrix, RawMatrix, joined
from cluster.model.quantization import pack_int4, quantize_int4, quantize_int8

FORMATS = ("plain", "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16)


def raw_and_exact(format_name: str, weight_OI: torch.Tensor, dtype: torch.dtype) -> tuple[RawMatrix, torch.Tensor]:
    """A matrix of this format near `weight_OI`, and what it stands for, float64."""
    if format_name == "plain":
        return RawMatrix(weight_OI.to(dtype)), weight_OI.to(dtype).double()
    if format_name == "int8":
        values, scales = quantize_int8(weight_OI)
        return RawMatrix(values, scales), values.double() * scales.double()[:, None]
    values, scales = quantize_int4(weight_OI)
    return RawMatrix(pack_int4(values), scales), values.double() * scales.double().repeat_interleave(32, dim=1)


def packed(
    library: ctypes.CDLL, raw: RawMatrix, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> PackedMatrix:
    return PackedMatrix(library, raw, bias, dtype, LargePages(library))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
@settings(deadline=None, max_examples=25)
@given(
    outputs=st.integers(1, 150),
    groups=st.integers(1, 4),
    odd=st.integers(0, 31),
    rows=st.integers(1, 70),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_and_rows_are_those_of_the_matrix(
    library, format_name, dtype, outputs, groups, odd, rows, has_bias, seed
):
    generator = torch.Generator().manual_seed(seed)
    inputs = 32 * groups - (0 if format_name == "int4" else odd)
    raw, exact_OI = raw_and_exact(format_name, torch.randn(outputs, inputs, generator=generator), dtype)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    matrix = packed(library, raw, bias, dtype)
    x_NI = torch.randn(rows, inputs, generator=generator).to(dtype)
    y_NO = matrix.product(x_NI)
    expected_NO = x_NI.double() @ exact_OI.T + (bias.double() if bias is not None else 0)
    # Sums of exact products in fp32.
    bound_NO = 1e-6 * (inputs**0.5) * (x_NI.double().abs() @ exact_OI.abs().T + 1)
    assert ((y_NO - expected_NO).abs() <= bound_NO).all()
    assert torch.equal(matrix.rows(torch.arange(outputs)).double(), exact_OI.float().double())
    row = seed % rows
    assert torch.equal(matrix.product(x_NI[row : row + 1])[0], y_NO[row]), "a row depends on those beside it"


@pytest.mark.parametrize("format_name", FORMATS)
def test_joined_matrices_are_one_below_the_other(library, format_name):
    parts = [raw_and_exact(format_name, torch.randn(outputs, 64), torch.float32) for outputs in (5, 32, 17)]
    matrix = packed(library, joined([raw for raw, _ in parts]))
    x_NI = torch.randn(3, 64)
    expected_NO = torch.cat([x_NI.double() @ exact_OI.T for _, exact_OI in parts], dim=1)
    torch.testing.assert_close(matrix.product(x_NI).double(), expected_NO, rtol=1e-5, atol=1e-5)


def test_infinity_and_nan_reach_their_own_row_only(library):
    weight_OI = torch.randn(40, 33)
    matrix = packed(library, RawMatrix(weight_OI))
    x_NI = torch.randn(5, 33)
    clean_NO = matrix.product(x_NI)
    x_NI[1, 3], x_NI[3, 7] = torch.inf, torch.nan
    y_NO = matrix.product(x_NI)
    assert not torch.isfinite(y_NO[[1, 3]]).any()
    assert torch.equal(y_NO[[0, 2, 4]], clean_NO[[0, 2, 4]])


def test_memory_is_handed_out_in_lines_that_do_not_meet(library):
    memory = LargePages(library, chunk_bytes=1000)
    pieces = [memory.take(size) for size in (1, 64, 500, 65, 5000, 3)]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0
        piece.fill_(number)
    assert [piece.unique().tolist() for piece in pieces] == [[number] for number in range(6)]
    assert memory.num_bytes == sum(len(piece) for piece in pieces)
