"""The router as a whole: what it answers, what adding, removing, refitting and storing do to it."""

import copy
import json
import math
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CorruptArtifact, InvalidData, InvalidInput, UnknownDomain
from cluster.messages import MAX_PROBABILITIES, NONE_DOMAIN, WEIGHT_STEP, RoutingDecision
from cluster.router.tiny_ada import TinyAda
from tests.router.prompts import DOMAINS, STRANGE, prompts

TAX = (
    "How do I file my income tax return?",
    "When is the tax declaration due?",
    "Is a pension deductible from income tax?",
    "Which tax bracket am I in?",
    "Tax refund for married couples",
    "What is deductible in my tax return?",
)
NEW_TAX = ("When must I file a tax return?", "Is my pension income deductible?", "tax refund due")


def _answers(decisions: list[RoutingDecision]) -> list[str]:
    return [max(d.weights, key=lambda name: d.weights[name], default=NONE_DOMAIN) for d in decisions]


def _share(found: list[str], wanted: list[str]) -> float:
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def test_unseen_sentences_reach_their_domain_and_strange_ones_none(ada: TinyAda) -> None:
    texts, domains = prompts("val", 30, seed=1)
    assert _share(_answers(ada.route(texts)), domains) >= 0.95
    assert _answers(ada.route(STRANGE)).count(NONE_DOMAIN) >= len(STRANGE) - 1


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=60), max_size=4))
@settings(deadline=None, max_examples=60)
def test_any_text_gets_a_decision(ada: TinyAda, texts: list[str]) -> None:
    decisions = ada.route(texts)
    assert len(decisions) == len(texts)
    for decision in decisions:
        assert set(decision.probabilities) == {*DOMAINS, NONE_DOMAIN}
        assert math.isclose(sum(decision.probabilities.values()), 1.0)
        assert len(decision.weights) <= 3
        assert sum(decision.weights.values()) in (0, 1.0)
        assert all((weight / WEIGHT_STEP).is_integer() for weight in decision.weights.values())


def test_a_megabyte_is_decided_in_bounded_time(ada: TinyAda) -> None:
    start_s = time.perf_counter()
    (decision,) = ada.route(["rain " * 200_000])
    assert time.perf_counter() - start_s < 1.0
    assert 0 < decision.compute_ms < 1000


def test_a_text_is_decided_alike_alone_and_in_a_batch(ada: TinyAda) -> None:
    texts = [*prompts("val", 5)[0], *STRANGE]
    together = ada.logits(texts)
    alone = torch.cat([ada.logits([text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-4)


def test_scores_are_the_probabilities_and_reach_the_table(ada: TinyAda) -> None:
    scores = ada.scores(["Will it rain?"])
    (decision,) = ada.route(["Will it rain?"])
    assert torch.allclose(scores.exp()[0], torch.tensor(list(decision.probabilities.values())), atol=1e-5)
    copied = copy.deepcopy(ada)
    copied.scores(["Will it rain?"])[0, 0].backward()  # type: ignore[no-untyped-call]
    gradient = copied.encoder.table.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0


def test_a_domain_comes_and_goes_without_a_trace(ada: TinyAda) -> None:
    texts = [*prompts("val", 10)[0], *STRANGE]
    before = ada.head.raw_logits(ada.encode(texts))
    grown = ada.with_domain("tax", TAX)
    assert grown.domains == ("cooking", "music", "sql", "tax", "weather")
    after = grown.head.raw_logits(grown.encode(texts))
    new = grown.domains.index("tax")
    assert torch.equal(torch.cat((after[:, :new], after[:, new + 1 :]), dim=1), before)
    back = grown.without_domain("tax")
    assert back.domains == ada.domains
    assert torch.equal(back.head.raw_logits(back.encode(texts)), before)
    assert ada.domains == DOMAINS, "the router it was added to is as it was"


def test_adding_and_removing_share_the_encoder_and_write_to_nothing_of_the_router_before(ada: TinyAda) -> None:
    before = {name: tensor.clone() for name, tensor in ada.state_dict().items()}
    grown = ada.with_domain("tax", TAX)
    shrunk = grown.without_domain("sql")
    assert grown.encoder is ada.encoder
    assert shrunk.encoder is ada.encoder
    held = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    known = ("cooking", "music", "tax", "weather")
    texts, domains = zip(*(row for row in zip(*prompts("train", 20), strict=True) if row[1] in known), strict=True)
    shrunk.refit([*texts, *TAX], [*domains, *["tax"] * len(TAX)], texts, domains)
    assert not torch.equal(shrunk.head.prototypes_DPV[0], grown.head.prototypes_DPV[0])
    for router, kept in ((ada, before), (grown, held)):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in router.state_dict().items())


def test_of_many_domains_the_likeliest_are_named(ada: TinyAda) -> None:
    many = ada
    for number in range(MAX_PROBABILITIES):
        many = many.with_domain(f"x{number:02}", [f"{word}{number} qx{number}" for word in ("ab", "cd")])
    text = "Which spice goes with paper?"
    (decision,) = many.route([text])
    whole = many.scores([text])[0].exp().tolist()
    by_name = dict(zip((*many.domains, NONE_DOMAIN), whole, strict=True))
    named = [name for name in decision.probabilities if name != NONE_DOMAIN]
    assert named == sorted(sorted(many.domains, key=lambda name: (-by_name[name], name))[:MAX_PROBABILITIES])
    assert decision.probabilities == pytest.approx({name: by_name[name] for name in (*named, NONE_DOMAIN)}, abs=1e-6)
    assert many.route_conversation([text]).probabilities == decision.probabilities


def test_a_domain_of_six_examples_is_recognised_and_steals_nothing(ada: TinyAda) -> None:
    grown = ada.with_domain("tax", TAX)
    assert _answers(ada.route(NEW_TAX)).count(NONE_DOMAIN) >= 2
    assert _answers(grown.route(NEW_TAX)).count("tax") >= 2
    texts, domains = prompts("val", 30, seed=2)
    assert _share(_answers(grown.route(texts)), domains) >= 0.95
    assert _answers(grown.route(STRANGE)).count("tax") <= 2


def test_names_and_examples_are_checked(ada: TinyAda) -> None:
    for name, examples in (("sql", TAX), ("none", TAX), ("Not A Name", TAX), ("tax", ())):
        with pytest.raises(InvalidInput):
            ada.with_domain(name, examples)
    with pytest.raises(UnknownDomain, match=r"'tax'.*cooking"):
        ada.without_domain("tax")


def test_what_is_saved_is_what_is_loaded(ada: TinyAda, tmp_path: Path) -> None:
    grown = ada.with_domain("tax", TAX)
    grown.save(tmp_path)
    loaded = TinyAda.load(tmp_path)
    texts = [*prompts("val", 10)[0], *STRANGE, *NEW_TAX]
    assert loaded.domains == grown.domains
    assert torch.equal(loaded.logits(texts), grown.logits(texts))
    assert [d.weights for d in loaded.route(texts)] == [d.weights for d in grown.route(texts)]
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_damaged_files_are_refused(ada: TinyAda, tmp_path: Path) -> None:
    ada.save(tmp_path)
    config, tensors = tmp_path / "router.json", tmp_path / "router.safetensors"
    good_config, good_tensors = config.read_text(), tensors.read_bytes()
    saved = json.loads(good_config)
    for change in ({"domains": saved["domains"][:-1]}, {"width": 16}, {"surprise": 1}, {"format": 2}):
        config.write_text(json.dumps({**saved, **change}))
        with pytest.raises(CorruptArtifact):
            TinyAda.load(tmp_path)
    config.write_text(good_config)
    impossible = {
        "no prototype": ("num_prototypes_D", 0),
        "too many": ("num_prototypes_D", 99),
        "long": ("prototypes_DPV", 3),
    }
    for name, factor in impossible.values():
        changed = safetensors.torch.load(good_tensors)
        changed[f"head.{name}"] = changed[f"head.{name}"] * factor if factor != 99 else changed[f"head.{name}"] + factor
        tensors.write_bytes(safetensors.torch.save(changed))
        with pytest.raises(CorruptArtifact, match="prototype"):
            TinyAda.load(tmp_path)
    tensors.write_bytes(good_tensors[:-100])
    with pytest.raises(CorruptArtifact):
        TinyAda.load(tmp_path)
    tensors.unlink()
    with pytest.raises(CorruptArtifact):
        TinyAda.load(tmp_path)


def test_refit_follows_an_encoder_that_turned(ada: TinyAda) -> None:
    """Every vector turned by one rotation keeps all angles: rebuilt prototypes must decide as the old ones did."""
    turned = copy.deepcopy(ada)
    width = turned.encoder.table.embedding_dim
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        turned.encoder.table.weight.copy_(turned.encoder.table.weight @ rotation.T)
        turned.encoder.up.weight.copy_(turned.encoder.up.weight @ rotation.T)
        turned.encoder.down.weight.copy_(rotation @ turned.encoder.down.weight)
        turned.encoder.down.bias.copy_(rotation @ turned.encoder.down.bias)
        turned.head.none_in.weight[:, :width] = turned.head.none_in.weight[:, :width] @ rotation.T
    texts, domains = prompts("val", 30, seed=3)
    assert _share(_answers(ada.route(texts)), domains) >= 0.95
    assert _share(_answers(turned.route(texts)), domains) < 0.6
    turned.refit(*prompts("train", 40), *prompts("train", 20, seed=5))
    assert _share(_answers(turned.route(texts)), domains) >= 0.95
    assert _answers(turned.route(STRANGE)).count(NONE_DOMAIN) >= len(STRANGE) - 2
    with pytest.raises(InvalidData, match="lack cooking, music, sql"):
        turned.refit(["Will it rain?"], ["weather"], ["Will it snow?"], ["weather"])
