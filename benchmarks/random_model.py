"""Writes a random model and adapters to be timed: speed does not depend on what the weights hold.

`python -m benchmarks.random_model OUT` writes `OUT/base` and `OUT/lora0`, `OUT/lora1`, ... in Hugging Face's and PEFT's
layouts: the 387M-parameter Qwen2 shape that the figures are about, with adapters on all linear layers of its blocks.
"""

import argparse
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from cluster.lora import peft_format
from cluster.lora.weights import AdapterWeights, Factors, adaptable_layers
from cluster.model.base import load_base
from cluster.model.tokenizer import train_tokenizer


@dataclass(frozen=True, slots=True)
class Shape:
    """A size of the random model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tokenizer_files: int
    """Files of the standard library that its tokenizer is trained on."""


SHAPES = {"387m": Shape(896, 4864, 24, 14, 2, 32_768, 200), "tiny": Shape(128, 512, 2, 4, 2, 8_192, 8)}
_TOKENIZER_VOCAB_SIZE = 16_384
_CONTEXT_TOKENS = 4096


def write_random_model(folder: Path, shape: Shape, num_adapters: int, rank: int = 16) -> None:
    """Write the base, its tokenizer and the adapters below `folder`, all in bf16."""
    torch.manual_seed(0)
    vocab_size = min(shape.vocab_size, _TOKENIZER_VOCAB_SIZE)
    tokenizer = train_tokenizer(library_texts(shape.tokenizer_files), vocab_size, _CONTEXT_TOKENS)
    config = Qwen2Config(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=_CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder / "base")
    model = Qwen2ForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder / "base")
    base = load_base(folder / "base", torch.bfloat16)
    for number in range(num_adapters):
        place = folder / f"lora{number}"
        place.mkdir()
        factors = {
            name: Factors(_random(rank, layer.in_features), _random(layer.out_features, rank), scale=2.0)
            for name, layer in adaptable_layers(base.model).items()
        }
        peft_format.save(place, AdapterWeights(factors, base.fingerprint), base_model_name="base")


def _random(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.02).to(torch.bfloat16)


def library_texts(num_files: int) -> Iterator[str]:
    """Something to train a tokenizer on: so many files of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for file in islice(files, num_files):
        yield file.read_text(errors="replace")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_model", description=__doc__)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--size", choices=SHAPES, default="387m")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    write_random_model(options.out, SHAPES[options.size], options.adapters, options.rank)
    print(options.out)


if __name__ == "__main__":
    main()
