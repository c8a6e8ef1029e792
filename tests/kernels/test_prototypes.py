"""The router's kernel against double precision, on this machine's instructions and on older ones."""

import ctypes
import math

import pytest
import torch

from cluster.kernels.library import Prototypes

SCALE = 12 / 2**30


@pytest.mark.parametrize("width", [1, 15, 96, 192, 449])
def test_log_means_are_those_of_double_precision_whatever_is_beside_them(library: ctypes.CDLL, width: int) -> None:
    rng = torch.Generator().manual_seed(width)
    sizes = torch.randint(1, 200, (60,), generator=rng)  # some beyond what is passed at once
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    bound = int(2**15 / math.sqrt(width))
    rows_RV = torch.randint(-bound, bound, (int(starts[-1]), width), generator=rng, dtype=torch.int16)
    keys_KV = torch.randint(-bound, bound, (5, width), generator=rng, dtype=torch.int16)

    def log_means(first: int, last: int) -> torch.Tensor:
        found_KG = torch.full((5, last - first), math.nan)
        groups = Prototypes(rows_RV.data_ptr(), starts[first:].data_ptr(), last - first, width)
        library.zephyra_log_means(keys_KV.data_ptr(), 5, ctypes.byref(groups), SCALE, found_KG.data_ptr())
        return found_KG

    whole_KG = log_means(0, 60)
    products_KR = SCALE * keys_KV.double() @ rows_RV.double().T
    for group in range(60):
        part_KR = products_KR[:, starts[group] : starts[group + 1]]
        expected_K = part_KR.logsumexp(1) - math.log(part_KR.shape[1])
        assert torch.allclose(whole_KG[:, group].double(), expected_K, rtol=1e-6, atol=2e-6)
        assert torch.equal(log_means(group, group + 1)[:, 0], whole_KG[:, group])
    assert log_means(0, 0).shape == (5, 0)
