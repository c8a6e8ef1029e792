"""The kernels of training against torch, in float64 and with its own gradients."""

import pytest
import torch
from torch import Tensor, nn

from cluster.kernels.training import attend, can_attend, can_normalize, normalize
from cluster.training.documents import document_attention

SHAPES = [(1, 1, 16), (4, 2, 16), (6, 2, 32), (3, 3, 48), (8, 1, 64), (2, 1, 128)]
"""Query heads, key heads, size."""
LENGTHS = (1, 31, 2, 33, 32, 5, 100, 1, 64)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_within_documents_and_its_gradients_are_torchs(shape: tuple[int, int, int], threads: int) -> None:
    queries, keys, size = shape
    tokens = sum(LENGTHS)
    q, k, v = (_random(tokens, heads, size, seed=i) for i, heads in enumerate((queries, keys, keys)))
    d_out = _random(tokens, queries, size, seed=9).detach()
    assert can_attend(q, k, v)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = attend(q, k, v, LENGTHS, 0.3)
        got = torch.autograd.grad(out, (q, k, v), d_out)
    finally:
        torch.set_num_threads(before)
    wide = [x.detach().double().requires_grad_(True) for x in (q, k, v)]
    expected = document_attention(*(x.transpose(0, 1) for x in wide), LENGTHS, 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, torch.autograd.grad(expected, wide, d_out.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


def test_large_scores_do_not_overflow_and_heads_of_any_stride_are_taken() -> None:
    q, k, v = (_random(2, 40, 32, seed=i) for i in range(3))
    got = attend(q.transpose(0, 1) * 60, k.transpose(0, 1) * 60, v.transpose(0, 1), (40,), 1.0)
    expected = document_attention(q.double() * 60, k.double() * 60, v.double(), (40,), 1.0)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(7, 192), (3, 5, 16), (4, 50), (1, 3)])
def test_normalisation_and_its_gradient_are_torchs(shape: tuple[int, ...]) -> None:
    x, weight, d_out = _random(*shape, seed=0), _random(shape[-1], seed=1).detach(), _random(*shape, seed=2).detach()
    assert can_normalize(x, weight)
    out = normalize(x, weight, 1e-6)
    (got,) = torch.autograd.grad(out, x, d_out)
    wide = x.detach().double().requires_grad_(True)
    expected = nn.functional.rms_norm(wide, (shape[-1],), weight.double(), 1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(expected, wide, d_out.double())
    torch.testing.assert_close(got.double(), slope, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_widened_on_the_way_in_and_rounded_on_the_way_out() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(7, 2, 16, generator=generator).bfloat16() for _ in range(3)]
    assert can_attend(*heads)
    expected = attend(*(head.float() for head in heads), [3, 4], 0.25).bfloat16()
    assert torch.equal(attend(*heads, [3, 4], 0.25), expected)
    x, weight = torch.randn(5, 16, generator=generator).bfloat16(), torch.rand(16, generator=generator).bfloat16()
    assert can_normalize(x, weight)
    assert torch.equal(normalize(x, weight, 1e-6), normalize(x.float(), weight.float(), 1e-6).bfloat16())


def test_other_numbers_are_left_to_torch() -> None:
    x = torch.ones(2, 1, 16)
    assert not can_attend(x.double(), x.double(), x.double())
    assert not can_attend(*(torch.ones(2, 1, 24),) * 3)
    assert not can_normalize(x.double(), torch.ones(16))
