"""Scoring in whole numbers: against double precision, with and without the kernel, and that nothing has a say but the
domain's own rows and the text's own key.
"""

import copy
import io
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.kernels import library
from cluster.router.encoder import NOVEL_WIDTH, NUM_EVIDENCE, Encoding
from cluster.router.head import SHARPNESS, Head, domain_logits, keys
from cluster.router.scoring import ONE, FixedPrototypes

WIDTH = 32


@pytest.fixture(params=["native", "torch"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the kernel, and without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(library, "native_library", lambda: None)
        elif library.native_library() is None:
            pytest.skip("no C++ compiler")
        yield request.param


def _unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _rows(num_domains: int, most: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prototypes of random length-1 rows, from one to `most` per domain; what is padding is far too large."""
    rng = torch.Generator().manual_seed(seed)
    num_prototypes_D = torch.randint(1, most + 1, (num_domains,), generator=rng)
    prototypes_DPV = _unit(num_domains, most, width, seed=seed)
    prototypes_DPV[torch.arange(most) >= num_prototypes_D[:, None]] = 99.0
    return prototypes_DPV, num_prototypes_D


def _double(prototypes_DPV: Tensor, num_prototypes_D: Tensor, keys_BV: Tensor) -> Tensor:
    """[B, D], domain by domain, in double precision."""
    columns = [
        (SHARPNESS * keys_BV.double() @ rows_PV[:count].double().T).logsumexp(1) - math.log(count)
        for rows_PV, count in zip(prototypes_DPV, num_prototypes_D.tolist(), strict=True)
    ]
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(keys_BV), 0, dtype=torch.float64)


def _rounded(values: Tensor) -> Tensor:
    return ((values.double() * ONE).round() / ONE).clamp(max=1 - 1 / ONE)


@given(st.integers(0, 30), st.integers(1, 90), st.integers(1, 80), st.integers(0, 9), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_logits_are_those_of_double_precision(
    num_domains: int, most: int, width: int, num_texts: int, seed: int
) -> None:
    prototypes_DPV, num_prototypes_D = _rows(num_domains, most, width, seed)
    keys_BV = _unit(num_texts, width, seed=seed + 1)
    found_BD = FixedPrototypes.of(prototypes_DPV, num_prototypes_D).logits(keys_BV, SHARPNESS)
    assert found_BD.shape == (num_texts, num_domains)
    # Of the rounded numbers all but exactly; of the others as near as rounding by half a unit, of 1 by one, allows.
    rounded_BD = _double(_rounded(prototypes_DPV), num_prototypes_D, _rounded(keys_BV))
    assert torch.allclose(found_BD.double(), rounded_BD, rtol=0, atol=4e-6)
    exact_BD = _double(prototypes_DPV, num_prototypes_D, keys_BV)
    bound = SHARPNESS * 2.01 * max(1.0, math.sqrt(width) / 2) / ONE
    assert torch.allclose(found_BD.double(), exact_BD, rtol=0, atol=bound)


def test_the_longest_vectors_do_not_overflow() -> None:
    key_V = torch.zeros(2 * WIDTH)
    key_V[[0, WIDTH]] = 1.0  # a unit vector, and all that is novel beside it
    row_V = key_V / math.sqrt(2)
    rows_DPV = torch.stack((row_V, -row_V))[:, None]
    found_BD = FixedPrototypes.of(rows_DPV, torch.ones(2, dtype=torch.long)).logits(key_V[None], SHARPNESS)
    assert torch.allclose(found_BD, SHARPNESS * math.sqrt(2) * torch.tensor([[1.0, -1.0]]), atol=2e-3)


@pytest.mark.parametrize("num_domains", [1, 7, 1000, 6000])
def test_neither_domains_nor_texts_beside_them_move_a_bit(num_domains: int) -> None:
    prototypes_DPV, num_prototypes_D = _rows(num_domains, 5, WIDTH, seed=num_domains)
    keys_BV = _unit(6, WIDTH, seed=1)
    whole_BD = FixedPrototypes.of(prototypes_DPV, num_prototypes_D).logits(keys_BV, SHARPNESS)
    for text in range(6):
        alone_BD = FixedPrototypes.of(prototypes_DPV, num_prototypes_D).logits(keys_BV[text : text + 1], SHARPNESS)
        assert torch.equal(alone_BD[0], whole_BD[text])
    for chosen_D in (torch.randperm(num_domains)[: 1 + num_domains // 2], torch.arange(num_domains).flip(0)):
        found_BD = FixedPrototypes.of(prototypes_DPV[chosen_D], num_prototypes_D[chosen_D]).logits(keys_BV, SHARPNESS)
        assert torch.equal(found_BD, whole_BD[:, chosen_D])
    wider_DPV = torch.nn.functional.pad(prototypes_DPV, (0, 0, 0, 11))
    assert torch.equal(FixedPrototypes.of(wider_DPV, num_prototypes_D).logits(keys_BV, SHARPNESS), whole_BD)


def _encoding(num_texts: int) -> Encoding:
    rng = torch.Generator().manual_seed(3)
    novel_BU = _unit(num_texts, NOVEL_WIDTH, seed=4) / 2
    return Encoding(_unit(num_texts, WIDTH, seed=5), novel_BU, torch.rand(num_texts, NUM_EVIDENCE, generator=rng))


def _head(num_domains: int) -> Head:
    head = Head(num_domains, 4, WIDTH)
    for domain in range(num_domains):
        head.set_rows(domain, _unit(1 + domain % 4, WIDTH + NOVEL_WIDTH, seed=domain))
    return head


def test_what_is_written_to_rows_is_scored_in_whatever_way_it_is_written() -> None:
    head, encoding = _head(6), _encoding(2)

    def assert_current(head: Head) -> None:
        expected_BD = domain_logits(keys(encoding), head.prototypes_DPV, head.num_prototypes_D)
        assert torch.allclose(head.raw_logits(encoding)[:, :-1], expected_BD, atol=2e-3)

    assert_current(head)
    head.set_rows(2, _unit(3, WIDTH + NOVEL_WIDTH, seed=50))
    assert_current(head)
    for copied in (copy.deepcopy(head), _pickled(head)):
        # As often as the head it was copied from had been written to: that must not pass for its rows.
        while copied.num_prototypes_D._version < head.num_prototypes_D._version:
            copied.num_prototypes_D[0] = 1
        while copied.prototypes_DPV._version < head.prototypes_DPV._version:
            copied.prototypes_DPV[:] = _unit(6, 4, WIDTH + NOVEL_WIDTH, seed=60)
        assert_current(copied)
        assert_current(head)
    head.prototypes_DPV = _unit(6, 4, WIDTH + NOVEL_WIDTH, seed=70)
    assert_current(head)
    other = _head(6)
    other.set_rows(0, _unit(4, WIDTH + NOVEL_WIDTH, seed=80))
    head.load_state_dict(other.state_dict())
    assert_current(head)
    with torch.inference_mode():
        head.insert(3)
        head.set_rows(3, _unit(2, WIDTH + NOVEL_WIDTH, seed=90))
        assert_current(head)
        head.set_rows(3, _unit(2, WIDTH + NOVEL_WIDTH, seed=91))
        assert_current(head)


def _pickled(head: Head) -> Head:
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, Head)
    return loaded


def test_the_gradient_is_that_of_floats_and_the_numbers_those_of_serving() -> None:
    head, encoding = _head(5), _encoding(3)
    served_BC = head(encoding).detach()
    gradients = []
    for score in (head.raw_logits, lambda e: domain_logits(keys(e), head.prototypes_DPV, head.num_prototypes_D)):
        z_BW = encoding.z_BW.clone().requires_grad_()
        logits_BC = score(Encoding(z_BW, encoding.novel_BU, encoding.evidence_BE))
        if logits_BC.shape == served_BC.shape:
            assert torch.equal(logits_BC, served_BC)
        (gradient,) = torch.autograd.grad((logits_BC[:, :5] * torch.arange(5)).sum(), z_BW)
        gradients.append(gradient)
    assert torch.allclose(*gradients, atol=1e-6)
    assert float(gradients[0].abs().sum()) > 0
