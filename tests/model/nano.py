"""Nano models with random weights far from those that training starts from, so that every part of them matters."""

from typing import Any

import torch
from torch import Tensor

from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM


def nano_model(seed: int = 0, **config: Any) -> ZephyraFusionForCausalLM:
    """A model in eval mode, as any test may have it: the same seed and configuration give the same weights."""
    torch.manual_seed(seed)
    model = ZephyraFusionForCausalLM(ZephyraFusionConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def random_ids(model: ZephyraFusionForCausalLM, rows: int, tokens: int, seed: int = 1) -> Tensor:
    """Token ids [rows, tokens]."""
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] without gradients."""
    with torch.no_grad():
        out: Tensor = model(input_ids=ids_BT).logits
    return out
