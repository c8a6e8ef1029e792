"""Writes a root to be served: a random base of the starter's shape and as many random adapters as are asked for.

Speed does not depend on what the weights hold. Adapters are written in bf16, each with bytes of its own, and published
in one generation.
"""

from pathlib import Path

import torch

from benchmarks.random_model import library_texts
from cluster.lora import peft_format
from cluster.lora.catalog import Catalog, Change
from cluster.lora.checksums import write_checksums
from cluster.lora.store import write_version
from cluster.lora.weights import AdapterWeights, Factors, adaptable_layers
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM
from cluster.model.base import load_base
from cluster.model.configuration_zephyra import SIZES
from cluster.model.tokenizer import train_tokenizer

_CONTEXT_TOKENS = 2048
_TOKENIZER_FILES = 8


def domain(number: int) -> str:
    """The name of one of the domains."""
    return f"d{number}"


def write_root(root: Path, num_domains: int, rank: int) -> None:
    """Write and publish the base and `num_domains` adapters of `rank` below `root`."""
    torch.manual_seed(0)
    shape = SIZES["starter"]
    tokenizer = train_tokenizer(library_texts(_TOKENIZER_FILES), shape["vocab_size"], _CONTEXT_TOKENS)
    config = ZephyraFusionConfig(
        **{**shape, "vocab_size": len(tokenizer), "max_position_embeddings": _CONTEXT_TOKENS},
        eos_token_id=tokenizer.eos_token_id,
    )

    def write_base(folder: Path) -> None:
        ZephyraFusionForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    version = write_version(root / "base", write_base)
    Catalog(root).publish(Change(base=version))
    base = load_base(root / "base" / str(version))
    layers = adaptable_layers(base.model)
    for number in range(num_domains):
        factors = {
            name: Factors(_random(rank, layer.in_features), _random(layer.out_features, rank), scale=2.0)
            for name, layer in layers.items()
        }
        # Written in place: nobody reads this root yet, and to sync each of thousands would take an hour.
        folder = root / "adapters" / domain(number) / "1"
        folder.mkdir(parents=True)
        peft_format.save(folder, AdapterWeights(factors, base.fingerprint), base_model_name="base")
        write_checksums(folder)
    Catalog(root).publish(Change(adapters={domain(number): 1 for number in range(num_domains)}))


def adapter_bytes(root: Path) -> int:
    """Of one adapter's tensors; all are alike."""
    return (root / "adapters" / domain(0) / "1" / "adapter_model.safetensors").stat().st_size


def _random(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.02).to(torch.bfloat16)
