"""Perplexity against a sum written out, and the cost of quantization against models quantized in memory."""

import math
from pathlib import Path

import pytest
import torch

from cluster.errors import InvalidData
from cluster.model.base import Base, load_base
from cluster.model.quantization import quantize_model
from cluster.training.data import Row
from cluster.training.perplexity import perplexity, quantization_costs, rows_of_all_domains
from tests.model.nano import nano_model
from tests.training.rows import nano_tokenizer, write_parquet

ROWS = [
    Row("law", "is this legal?" + " why" * index, "yes, no and 42 " * (index + 1), "") for index in range(5)
]  # of five lengths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "1"
    nano_model(vocab_size=len(nano_tokenizer())).save_pretrained(base)
    nano_tokenizer().save_pretrained(base)
    return base


def _written_out(base: Base) -> float:
    """Of one row after the other, in float64."""
    nats, num_tokens = 0.0, 0
    for row in ROWS:
        prompt = base.tokenizer(row.prompt).input_ids
        answer = [*base.tokenizer(row.response, add_special_tokens=False).input_ids, base.tokenizer.eos_token_id]
        with torch.no_grad():
            logits_TV = base.model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
        for index, token in enumerate(answer):
            nats -= float(logits_TV[len(prompt) + index - 1].log_softmax(-1)[token])
        num_tokens += len(answer)
    return math.exp(nats / num_tokens)


def test_perplexity_is_that_of_the_answers_tokens(folder: Path) -> None:
    base = load_base(folder)
    assert perplexity(base, ROWS) == pytest.approx(_written_out(base), rel=1e-4)


def test_the_cost_of_a_quantization_is_measured_on_the_quantized_base(folder: Path) -> None:
    costs = quantization_costs(folder, ROWS)
    plain = _written_out(load_base(folder))
    for quantization, cost in costs.items():
        base = load_base(folder)
        quantize_model(base.model, quantization)
        assert cost.perplexity == pytest.approx(_written_out(base), rel=1e-4)
        assert cost.rise == pytest.approx(_written_out(base) / plain - 1, abs=1e-3)
    assert costs["int4"].bytes_over_bf16 < costs["int8"].bytes_over_bf16 < 0.55
    assert list(folder.parent.iterdir()) == [folder], "what was measured is thrown away"


def test_rows_are_the_first_of_every_domain(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    assert [row.prompt for row in rows_of_all_domains(tmp_path, "train", 1)] == ["is this legal?", "7 times 6"]
    with pytest.raises(InvalidData, match="has no test rows of any domain"):
        rows_of_all_domains(tmp_path, "test", 1)
