"""Bases of every architecture that is served, small and random, and float models of quantized weights."""

import copy
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from cluster.lora.weights import adaptable_layers
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM

ARCHITECTURES = ("zephyra", "llama", "qwen2", "qwen3", "smollm3")
VOCABULARY = 340
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def small_model(architecture: str, tied: bool) -> PreTrainedModel:
    """A model whose biases, where it has some, are not zero. Llama's rotary angles are stretched as Llama 3's are."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {**_SHAPE, "tie_word_embeddings": tied}
    if architecture == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=_LLAMA3_ROPE))
    else:
        model = {
            "zephyra": lambda: ZephyraFusionForCausalLM(ZephyraFusionConfig(**shape, head_dim=16)),
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
            "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
            "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**shape)),
        }[architecture]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.1)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def with_dequantized_weights(model: PreTrainedModel, quantized: PreTrainedModel) -> PreTrainedModel:
    """A copy of the float `model` that holds what the integers of `quantized` stand for."""
    same = copy.deepcopy(model)
    for name, linear in adaptable_layers(same).items():
        linear.weight.copy_(quantized.get_submodule(name).dequantized())
    same.get_input_embeddings().weight.copy_(quantized.get_input_embeddings().matrix.dequantized())
    same.get_output_embeddings().weight.copy_(quantized.get_output_embeddings().dequantized())
    return same
