"""Perplexity of a base, and what quantization costs of it. Knows nothing of adapters or the engine."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.config.settings import Quantization
from cluster.errors import InvalidData
from cluster.model.base import Base, load_base, quantize_base
from cluster.training.data import Row, encode, read_data
from cluster.training.language_model import mean_loss
from cluster.training.stage_adapters import padding_id

_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True, slots=True)
class QuantizationCost:
    """One quantized form of a base beside its floats, both computing in fp32."""

    perplexity: float
    rise: float
    """Share by which perplexity lies above the float base's."""
    bytes_over_bf16: float
    """Memory of the weights, loaded in bf16, over that of the floats in bf16."""


def rows_of_all_domains(data: Path, split: str, rows_per_domain: int) -> list[Row]:
    """The first rows of every domain in a split. Raises `InvalidData` when there are none."""
    content = read_data(data)
    rows = [row for domain in content.domains for row in content.rows(split, domain, rows_per_domain)]
    if not rows:
        raise InvalidData(f"{data} has no {split} rows of any domain.")
    return rows


def perplexity(base: Base, rows: Sequence[Row], max_tokens: int = 384) -> float:
    """Of the rows' answers under the plain base, per token; a row is cut at `max_tokens`."""
    examples = encode(base.tokenizer, rows, max_tokens)
    return math.exp(mean_loss(base.model, examples, padding_id(base.tokenizer), _TOKENS_PER_BATCH))


def quantization_costs(
    folder: Path, rows: Sequence[Row], quantizations: Sequence[Quantization] = ("int8", "int4")
) -> dict[Quantization, QuantizationCost]:
    """What each quantization costs the float base in `folder`: written and loaded as served, then thrown away."""
    base = load_base(folder)
    float_perplexity, bf16_bytes = perplexity(base, rows), 2 * base.num_parameters
    costs: dict[Quantization, QuantizationCost] = {}
    for quantization in quantizations:
        with tempfile.TemporaryDirectory() as draft:
            quantize_base(folder, Path(draft), quantization)
            quantized = perplexity(load_base(Path(draft)), rows)
            num_bytes = load_base(Path(draft), torch.bfloat16).weight_bytes
        costs[quantization] = QuantizationCost(quantized, quantized / float_perplexity - 1, num_bytes / bf16_bytes)
    return costs
