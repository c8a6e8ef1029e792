"""Words read off an adapter's weights: against dense products, and that what they add to a router is marked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from cluster.errors import InvalidInput
from cluster.lora.weights import AdapterWeights, Factors
from cluster.model.tokenizer import train_tokenizer
from cluster.router.data_free import as_examples, words_of_adapter
from cluster.router.explanation import explain
from cluster.router.tiny_ada import TinyAda
from tests.router.prompts import STRANGE, prompts

WIDTH, RANK = 48, 4
TAX_WORDS = ("tax", "income", "return", "pension", "deductible", "declaration", "refund", "bracket", "file", "married")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([f" {word}" for word in TAX_WORDS * 3 + ("lamp", "river", "garden") * 3], 420, 64)


@pytest.fixture(scope="module")
def embeddings(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Of very different lengths, which must not matter."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(len(tokenizer), WIDTH, generator=rng) * torch.rand(len(tokenizer), 1, generator=rng) * 9


def _adapter(seed: int, **changed: Factors) -> AdapterWeights:
    rng = torch.Generator().manual_seed(seed)

    def factors() -> Factors:
        return Factors(torch.randn(RANK, WIDTH, generator=rng), torch.randn(32, RANK, generator=rng), 0.5)

    layers = ("q_proj", "k_proj", "v_proj", "o_proj")
    every = {f"model.layers.{n}.self_attn.{layer}": factors() for n in (0, 1) for layer in layers}
    every |= {f"model.layers.0.self_attn.{layer}": given for layer, given in changed.items()}
    return AdapterWeights({**every, "model.layers.0.mlp.up_proj": factors()}, "base")


def _lengths(weights: AdapterWeights, embeddings: torch.Tensor) -> np.ndarray:
    """Token by token, through dense deltas in double precision."""
    found = []
    for x in embeddings.double().numpy():
        total = 0.0
        for layer in ("q_proj", "k_proj", "v_proj"):
            factors = weights.factors[f"model.layers.0.self_attn.{layer}"]
            delta = factors.scale * factors.b_OR.double().numpy() @ factors.a_RI.double().numpy()
            total += float(np.sum((delta @ (x / np.linalg.norm(x))) ** 2))
        found.append(total**0.5)
    return np.array(found)


def _ranked(scores: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    texts = [tokenizer.decode([token]).strip() for token in np.argsort(-scores)]
    return list(dict.fromkeys(text for text in texts if text.isalpha() and text.isascii() and len(text) >= 3))


def test_words_are_those_that_the_delta_makes_longest(
    tokenizer: PreTrainedTokenizerBase, embeddings: torch.Tensor
) -> None:
    own, others = _adapter(1), [_adapter(2), _adapter(3)]
    lengths = _lengths(own, embeddings)
    found = words_of_adapter(own, embeddings, tokenizer, num_words=12)
    assert found == _ranked(lengths, tokenizer)[:12]
    mean = np.mean([lengths, *(_lengths(other, embeddings) for other in others)], axis=0)
    relative = words_of_adapter(own, embeddings, tokenizer, 12, others)
    assert relative == _ranked(lengths / mean, tokenizer)[:12] != found


def test_an_adapter_made_to_react_to_some_words_gives_those(
    tokenizer: PreTrainedTokenizerBase, embeddings: torch.Tensor
) -> None:
    tokens = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in TAX_WORDS[:RANK]]
    assert all(len(ids) == 1 for ids in tokens)
    rows = torch.nn.functional.normalize(embeddings[[ids[0] for ids in tokens]], dim=1) * 50
    reacting = _adapter(4, q_proj=Factors(rows, torch.eye(32)[:, :RANK], 1.0))
    assert set(words_of_adapter(reacting, embeddings, tokenizer, RANK)) == set(TAX_WORDS[:RANK])


def test_an_adapter_without_such_a_layer_is_refused(
    tokenizer: PreTrainedTokenizerBase, embeddings: torch.Tensor
) -> None:
    with pytest.raises(InvalidInput, match="reads 24 numbers; give examples"):
        words_of_adapter(_adapter(1), embeddings[:, :24], tokenizer)


def test_the_domain_is_marked_and_the_mark_is_kept(ada: TinyAda, tmp_path: Path) -> None:
    texts = [*prompts("val", 5)[0], *STRANGE]
    grown = ada.with_domain("tax", as_examples(TAX_WORDS), is_data_free=True)
    assert (grown.data_free, ada.data_free) == ({"tax"}, frozenset())
    assert grown.without_domain("tax").data_free == frozenset()
    assert grown.with_domain("art", ["paint a portrait"]).data_free == {"tax"}
    kept = [index for index, name in enumerate((*grown.domains, "none")) if name != "tax"]
    assert torch.equal(grown.logits(texts)[:, kept], ada.logits(texts))
    grown.save(tmp_path)
    loaded = TinyAda.load(tmp_path)
    assert loaded.data_free == {"tax"}
    assert torch.equal(loaded.logits(texts), grown.logits(texts))
    config = json.loads((tmp_path / "router.json").read_text())
    del config["data_free"]
    (tmp_path / "router.json").write_text(json.dumps(config))
    assert TinyAda.load(tmp_path).data_free == frozenset(), "a router saved before there were any"


def test_words_of_the_adapter_recognise_prompts_that_speak_of_them(ada: TinyAda) -> None:
    grown = ada.with_domain("tax", as_examples(TAX_WORDS), is_data_free=True)
    (decision,) = grown.route(["income tax return refund"])
    assert set(decision.weights) == {"tax"}
    assert explain(grown, "income tax return refund").is_data_free
    assert not explain(grown, prompts("val", 1)[0][0]).is_data_free
    texts, domains = prompts("val", 20, seed=12)
    assert [max(d.weights, key=d.weights.__getitem__) for d in grown.route(texts)] == domains
