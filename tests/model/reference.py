"""Zephyra Fusion once more: slow, in float64, one token and one head at a time, sharing no code with the model.

Letters: T tokens, D hidden size, H head size, F feed-forward width, V vocabulary.
"""

import math

import torch
from torch import Tensor

from cluster.model import ZephyraFusionConfig


def reference_logits(weights: dict[str, Tensor], config: ZephyraFusionConfig, ids: list[int]) -> Tensor:
    """Logits [T, V] of one sequence, from the model's weights by name."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    stream_TD = torch.stack([w["model.embed_tokens.weight"][token] for token in ids])
    for layer in range(config.num_hidden_layers):
        part = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in w.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        stream_TD = stream_TD + _attention(part, config, _norm(stream_TD, part["input_layernorm.weight"], config))
        normed_TD = _norm(stream_TD, part["post_attention_layernorm.weight"], config)
        stream_TD = stream_TD + _feed_forward(part, config, normed_TD)
    return _norm(stream_TD, w["model.norm.weight"], config) @ w["model.embed_tokens.weight"].T


def _norm(x: Tensor, weight: Tensor, config: ZephyraFusionConfig) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weight


def _turn(x_H: Tensor, position: int, config: ZephyraFusionConfig) -> Tensor:
    """Rotary embedding as complex numbers: element i and element i + H/2 are one of them."""
    half = config.head_dim // 2
    out_H = torch.empty_like(x_H)
    for i in range(half):
        angle = position * config.rope_theta ** (-2 * i / config.head_dim)
        turned = complex(x_H[i], x_H[i + half]) * complex(math.cos(angle), math.sin(angle))
        out_H[i], out_H[i + half] = turned.real, turned.imag
    return out_H


def _attention(w: dict[str, Tensor], config: ZephyraFusionConfig, x_TD: Tensor) -> Tensor:
    size = config.head_dim

    def head(name: str, index: int, position: int) -> Tensor:
        rows = w[f"self_attn.{name}_proj.weight"][index * size : (index + 1) * size]
        return rows @ x_TD[position]

    queries_per_key = config.num_attention_heads // config.num_key_value_heads
    out_TD = torch.zeros_like(x_TD)
    for t in range(len(x_TD)):
        heads = []
        for n in range(config.num_attention_heads):
            k = n // queries_per_key
            q_H = _turn(_norm(head("q", n, t), w["self_attn.q_norm.weight"], config), t, config)
            keys = [
                _turn(_norm(head("k", k, s), w["self_attn.k_norm.weight"], config), s, config) for s in range(t + 1)
            ]
            scores = torch.stack([q_H @ key_H / math.sqrt(size) for key_H in keys])
            shares = torch.exp(scores - scores.max())
            shares = shares / shares.sum()
            heads.append(sum(share * head("v", k, s) for s, share in enumerate(shares)))
        out_TD[t] = w["self_attn.o_proj.weight"] @ torch.cat(heads)
    return out_TD


def _feed_forward(w: dict[str, Tensor], config: ZephyraFusionConfig, x_TD: Tensor) -> Tensor:
    up_TF = x_TD @ w["mlp.up_proj.weight"].T
    if config.feed_forward == "swiglu":
        gate_TF = x_TD @ w["mlp.gate_proj.weight"].T
        hidden_TF = up_TF * gate_TF / (1 + torch.exp(-gate_TF))
    else:
        hidden_TF = torch.where(up_TF > 0, up_TF**2, 0.0)
    return hidden_TF @ w["mlp.down_proj.weight"].T
