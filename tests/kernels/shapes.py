"""Small random decoders of every shape that the native kernels are to know, and a few that they are not."""

from functools import cache

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

from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

MAKERS = {
    "zephyra": lambda: ZephyraFusionForCausalLM(ZephyraFusionConfig(**SHAPE)),
    "zephyra_gated": lambda: ZephyraFusionForCausalLM(
        ZephyraFusionConfig(**{**SHAPE, "hidden_size": 33, "feed_forward": "swiglu"})
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LAMA3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "head_dim": 8}, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, attention_bias=True)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SHAPE, no_rope_layer_interval=2)),
}
KINDS = tuple(MAKERS)


@cache
def _made(kind: str) -> PreTrainedModel:
    torch.manual_seed(KINDS.index(kind))
    model: PreTrainedModel = MAKERS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.5 if "embed" in name or "lm_head" in name else 0.15)
    return model.eval().requires_grad_(False)


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh copy: a decoder takes the weights of its model away."""
    made = _made(kind)
    model = type(made)(made.config)
    model.load_state_dict(made.state_dict())
    model.tie_weights()
    return torch.nn.Module.to(model, dtype).eval().requires_grad_(False)
