"""The formula against its slow reference in float64, and what must not leak from one row into another."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.lora.delta import dense_delta, mask_columns, mixed_delta

WIDTH_IN, WIDTH_OUT = 12, 9


@st.composite
def systems(draw: st.DrawFn) -> tuple[list[int], list[list[float]], int]:
    """Ranks of the adapters, each row's weights over them (zeros and all-zero rows among them), and a seed."""
    ranks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    weight = st.sampled_from([0.0, 0.0, 1 / 64, 0.25, 1.0, 3.0])
    row = st.lists(weight, min_size=len(ranks), max_size=len(ranks))
    return ranks, draw(st.lists(row, min_size=1, max_size=7)), draw(st.integers(0, 2**31))


@settings(deadline=None, max_examples=60)
@given(systems())
def test_each_row_gets_the_dense_delta_of_its_own_mixture(system: tuple[list[int], list[list[float]], int]) -> None:
    ranks, weights, seed = system
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(len(weights), WIDTH_IN, generator=generator)
    factors = [
        (torch.randn(r, WIDTH_IN, generator=generator), torch.randn(WIDTH_OUT, r, generator=generator)) for r in ranks
    ]
    scales = [0.5 + index for index in range(len(ranks))]
    owner_C = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    mask_TC = mask_columns(torch.tensor(weights), owner_C, torch.tensor(scales)[owner_C])
    got_TO = mixed_delta(x_TI, torch.cat([a for a, _ in factors]), torch.cat([b.T for _, b in factors]), mask_TC)
    for row, of_row in enumerate(weights):
        scaled = [(a_RI, scale * b_OR) for (a_RI, b_OR), scale in zip(factors, scales, strict=True)]
        expected_O = dense_delta(scaled, of_row) @ x_TI[row].double()
        torch.testing.assert_close(got_TO[row].double(), expected_O, rtol=1e-4, atol=1e-4)
        if not any(of_row):
            assert torch.equal(got_TO[row], torch.zeros(WIDTH_OUT))


def test_an_adapter_that_overflows_leaves_the_other_rows_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(3, WIDTH_IN, generator=generator)
    a_CI, b_CO = torch.randn(4, WIDTH_IN, generator=generator), torch.randn(4, WIDTH_OUT, generator=generator)
    a_CI[2:] *= 1e38
    x_TI[1] *= 100
    mask_TC = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    got_TO = mixed_delta(x_TI, a_CI, b_CO, mask_TC)
    alone_TO = mixed_delta(x_TI, a_CI[:2], b_CO[:2], mask_TC[:, :2])
    assert not torch.isfinite(got_TO[1]).all(), "the bad adapter was meant to overflow in its own row"
    torch.testing.assert_close(got_TO[0], alone_TO[0])
    assert torch.equal(got_TO[2], torch.zeros(WIDTH_OUT))


def test_infinity_in_the_bottleneck_of_every_row_reaches_only_the_rows_that_asked_for_it() -> None:
    x_TI = torch.full((2, WIDTH_IN), 1e3)
    a_CI = torch.cat([torch.ones(1, WIDTH_IN), torch.full((1, WIDTH_IN), 1e38)])
    b_CO = torch.ones(2, WIDTH_OUT)
    got_TO = mixed_delta(x_TI, a_CI, b_CO, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(got_TO[0], torch.full((WIDTH_OUT,), 1e3 * WIDTH_IN))
    assert torch.isinf(got_TO[1]).all()


def test_the_bottleneck_is_fp32_whatever_the_dtype_of_x() -> None:
    # 256 and 1 have no bf16 sum: in a bf16 bottleneck, 256.0 * (1 + 1/256) would come back as 256.
    x_TI = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    a_CI, b_CO = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1)
    assert float(mixed_delta(x_TI, a_CI, b_CO, torch.tensor([[1 + 1 / 256]]))) == 257.0
