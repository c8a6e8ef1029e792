"""Training: resumable to the bit, reproducible, within its size, and strict about what it is given."""

from pathlib import Path

import pytest
import torch

from cluster.errors import InvalidData, InvalidInput
from cluster.router.features import extract
from cluster.router.fit import PARAMETER_FLOOR, RouterFit
from cluster.router.lexicon import UNKNOWN, count
from tests.router.conftest import SETTINGS
from tests.router.prompts import prompts


def _run(num_base_parameters: int = 1_000_000, seed: int = 0) -> RouterFit:
    settings = SETTINGS.model_copy(update={"seed": seed})
    return RouterFit(*prompts("train", 30), *prompts("val", 10), settings, num_base_parameters)


def _same(one: RouterFit, other: RouterFit) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    unbroken, interrupted = _run(), _run()
    losses = [unbroken.step() for _ in range(8)]
    for _ in range(3):
        interrupted.step()
    interrupted.save(tmp_path)
    resumed = _run()
    assert resumed.load(tmp_path) == 3
    assert [resumed.step() for _ in range(5)] == losses[3:]
    assert _same(resumed, unbroken)
    texts = prompts("val", 5)[0]
    assert torch.equal(resumed.finish().logits(texts), unbroken.finish().logits(texts))


def test_the_seed_decides() -> None:
    first, same, other = _run(), _run(), _run(seed=1)
    losses = [[run.step() for _ in range(3)] for run in (first, same, other)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_the_loss_falls(fit: RouterFit) -> None:
    losses = [fit.step() for _ in range(fit.num_steps)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("num_base_parameters", [1_000_000, 10_000_000, 60_000_000])
def test_size_follows_the_base(num_base_parameters: int) -> None:
    num_parameters = _run(num_base_parameters).finish().num_parameters
    assert num_parameters <= max(PARAMETER_FLOOR, 0.05 * num_base_parameters)
    assert num_parameters >= 0.01 * num_base_parameters


def test_a_checkpoint_of_other_texts_is_refused() -> None:
    other = RouterFit(*prompts("train", 31, seed=9), *prompts("val", 10), SETTINGS, 1_000_000)
    with pytest.raises(InvalidData, match="other texts or settings"):
        _run().load_state_dict(other.state_dict())


def test_data_is_checked() -> None:
    texts, domains = prompts("train", 5)
    val = prompts("val", 5)
    for arguments, error in (
        ((texts, domains[1:], *val), InvalidData),
        ((texts, ["none"] * len(texts), *val), InvalidData),
        ((texts, domains, ["a"], ["unheard-of"]), InvalidData),
        ((texts, domains, [], []), InvalidData),
        ((texts, ["Not A Name"] * len(texts), *val), InvalidInput),
    ):
        with pytest.raises(error):
            RouterFit(*arguments, SETTINGS, 1_000_000)


def test_rows_go_to_what_tells_domains_apart() -> None:
    texts, domains = prompts("train", 60)
    numbers = torch.tensor([sorted(set(domains)).index(name) for name in domains]).numpy()
    counted = count([extract(text) for text in texts], numbers, 5, num_rows=100)

    def row(word: str) -> int:
        return int(counted.lexicon.rows[int(extract(word).slots_N[0])])

    assert row("recipe") >= 0
    assert row("forecast") >= 0
    assert row("penicillin") == UNKNOWN
    # Known, but spread over all domains, so it says nothing.
    assert UNKNOWN != row("lamp") < 0
