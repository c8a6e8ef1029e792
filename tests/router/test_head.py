"""The head against a slow loop, and the promise that domains do not touch each other's logits."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router.calibration import MIN_TEMPERATURE, fit_temperature, fit_threshold
from cluster.router.encoder import NOVEL_WIDTH, NUM_EVIDENCE, Encoding
from cluster.router.head import SHARPNESS, Head, domain_logits, keys
from cluster.router.prototypes import cluster_prototypes, recentre

WIDTH = 8


def _unit(*shape: int, seed: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def _encoding(num_texts: int, seed: int) -> Encoding:
    rng = torch.Generator().manual_seed(seed)
    return Encoding(
        _unit(num_texts, WIDTH, seed=seed),
        torch.randn(num_texts, NOVEL_WIDTH, generator=rng) / 10,
        torch.rand(num_texts, NUM_EVIDENCE, generator=rng),
    )


def _head(num_domains: int, seed: int) -> Head:
    head = Head(num_domains, 4, WIDTH)
    for domain in range(num_domains):
        head.set_rows(domain, _unit(1 + (seed + domain) % 4, WIDTH + NOVEL_WIDTH, seed=seed + domain))
        head.offsets_D[domain] = 0.1 * domain
    return head


def test_logits_equal_a_slow_loop() -> None:
    head, encoding = _head(5, seed=1), _encoding(3, seed=2)
    head.none_offset.fill_(0.7)
    head.temperature.fill_(1.7)
    logits = head(encoding).detach()
    for text, key in enumerate(keys(encoding).double()):
        for domain in range(5):
            rows = head.prototypes_DPV[domain, : head.num_prototypes_D[domain]].double()
            mean = sum(math.exp(SHARPNESS * float(row @ key)) for row in rows) / len(rows)
            expected = (math.log(mean) + 0.1 * domain) / 1.7
            # Scored in 16 bits: tests/router/test_scoring.py has the exact comparison.
            assert math.isclose(float(logits[text, domain]), expected, abs_tol=1e-3)
        assert torch.allclose(logits[text, -1], (head.none_logit(encoding)[text] + 0.7) / 1.7)


@given(st.integers(0, 40), st.integers(0, 10_000), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=40)
def test_adding_and_removing_a_domain_moves_no_other_bit(
    num_domains: int, seed: int, num_texts: int, data: st.DataObject
) -> None:
    head, encoding = _head(num_domains, seed), _encoding(num_texts, seed)
    before = head.raw_logits(encoding)
    index = data.draw(st.integers(0, num_domains))
    head.insert(index)
    head.set_rows(index, _unit(3, WIDTH + NOVEL_WIDTH, seed=seed + 77))
    grown = head.raw_logits(encoding)
    assert torch.equal(torch.cat((grown[:, :index], grown[:, index + 1 :]), dim=1), before)
    head.remove(index)
    assert torch.equal(head.raw_logits(encoding), before)


def test_padding_rows_do_not_count() -> None:
    rows = _unit(2, 3, WIDTH, seed=5)
    padded = torch.cat((rows, torch.full((2, 5, WIDTH), 9.0)), dim=1)
    key, count = _unit(4, WIDTH, seed=6), torch.tensor([3, 3])
    assert torch.allclose(domain_logits(key, padded, count), domain_logits(key, rows, count), atol=1e-5)


def test_prototypes_find_separate_clusters_whatever_the_order() -> None:
    centres = torch.eye(WIDTH)[:4]
    noise = 0.05 * torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0))
    examples = centres.repeat(10, 1) + noise
    for order in (torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(1))):
        found = cluster_prototypes(examples[order], 4)
        nearest = (found @ centres.T).max(dim=1)
        assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
        assert float(nearest.values.min()) > 0.99


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_prototypes_are_few_unit_vectors_and_recentring_never_worsens(num_examples: int, most: int, seed: int) -> None:
    examples = _unit(num_examples, WIDTH, seed=seed)
    found = cluster_prototypes(examples, most)
    assert 1 <= len(found) <= min(most, num_examples)
    assert torch.allclose(found.norm(dim=1), torch.ones(len(found)), atol=1e-5)
    start = _unit(most, WIDTH, seed=seed + 1)
    moved = recentre(examples, start)
    near = [float((examples @ rows.T).amax(1).sum()) for rows in (start, moved)]
    assert near[1] >= near[0] - 1e-4


def test_examples_all_alike_give_one_prototype() -> None:
    assert len(cluster_prototypes(torch.ones(5, WIDTH), 4)) == 1


def test_temperature_recovers_the_one_that_drew_the_labels() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 4, generator=rng)
    labels = torch.multinomial((logits / 2.5).softmax(1), 1, generator=rng).squeeze(1)
    assert math.isclose(fit_temperature(logits, labels), 2.5, rel_tol=0.05)
    assert math.isclose(fit_temperature(50 * torch.eye(3), torch.arange(3)), MIN_TEMPERATURE, rel_tol=1e-3)


def test_threshold_turns_away_the_share_it_promises() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4_000, 3, generator=rng)
    labels = torch.randint(0, 2, (4_000,), generator=rng)
    threshold = fit_threshold(logits[:2_000], labels[:2_000], target_false_rejection=0.1)
    margins = logits[2_000:, :2].amax(1) - logits[2_000:, 2]
    assert threshold < 0
    assert abs(float((margins < threshold).float().mean()) - 0.1) < 0.025
    # Never above 0, where a domain is as likely as none; none's own prompts have no say.
    certain = torch.tensor([[9.0, 1.0], [4.0, 0.0], [5.0, 0.0], [0.0, 99.0]])
    assert fit_threshold(certain, torch.tensor([0, 0, 0, 1]), target_false_rejection=0.25) == 0.0
