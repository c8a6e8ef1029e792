"""Zephyra Fusion: our decoder-only transformer, as an ordinary transformers model.

What it is made of and why is in the decisions; every linear layer is a plain `nn.Linear`, so that adapters and
quantizers find it. Letters: B sequences, T tokens, S cached and new tokens, D hidden size, N query heads,
K key-value heads, H head size, F feed-forward width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cluster.model.configuration_zephyra import ZephyraFusionConfig


def rotate(x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated against each other.

    Both halves of the cosines are the same, and of the sines.
    """
    out_BNTH: Tensor = _Rotate.apply(x_BNTH, cos_BTH, sin_BTH)
    return out_BNTH


class _Rotate(torch.autograd.Function):
    """In place on halves: a turned copy of `x` would cost more passes over memory than the products, both ways."""

    @staticmethod
    def forward(ctx: Any, x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTH, sin_BTH)
        return _Rotate._turned(x_BNTH, cos_BTH, sin_BTH, 1)

    @staticmethod
    def backward(ctx: Any, d_out_BNTH: Tensor) -> tuple[Tensor, None, None]:
        cos_BTH, sin_BTH = ctx.saved_tensors
        return _Rotate._turned(d_out_BNTH, cos_BTH, sin_BTH, -1), None, None

    @staticmethod
    def _turned(x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor, direction: int) -> Tensor:
        first, second = x_BNTH.chunk(2, dim=-1)
        half_sin = sin_BTH.chunk(2, dim=-1)[0].unsqueeze(1)
        out_BNTH = x_BNTH * cos_BTH.unsqueeze(1)
        first_out, second_out = out_BNTH.chunk(2, dim=-1)
        first_out.addcmul_(second, half_sin, value=-direction)
        second_out.addcmul_(first, half_sin, value=direction)
        return out_BNTH


class ZephyraFusionRotary(nn.Module):
    """Cosines and sines of the rotary angles of given positions, computed in fp32, in the dtype of `x`."""

    def __init__(self, config: ZephyraFusionConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        exponent = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32) / self.head_dim
        angles_BTH = (position_ids[..., None].float() * self.theta**-exponent).repeat(1, 1, 2)
        return angles_BTH.cos().to(x.dtype), angles_BTH.sin().to(x.dtype)


class ZephyraFusionAttention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys (QK-norm: Henry et al. 2020, arXiv 2010.04245)."""

    def __init__(self, config: ZephyraFusionConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        heads_shape = (*x_BTD.shape[:-1], -1, self.head_dim)
        q_BNTH = rotate(self.q_norm(self.q_proj(x_BTD).view(heads_shape)).transpose(1, 2), *rotary)
        k_BKTH = rotate(self.k_norm(self.k_proj(x_BTD).view(heads_shape)).transpose(1, 2), *rotary)
        v_BKTH = self.v_proj(x_BTD).view(heads_shape).transpose(1, 2)
        if past_key_values is not None:
            k_BKTH, v_BKTH = past_key_values.update(k_BKTH, v_BKTH, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, sdpa_attention_forward
        )
        out_BTNH, _ = attend(self, q_BNTH, k_BKTH, v_BKTH, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        out_BTD: Tensor = self.o_proj(out_BTNH.reshape(*x_BTD.shape[:-1], -1))
        return out_BTD


class _SquaredRelu(torch.autograd.Function):
    """`x.relu().square()` with half the passes over memory on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        positive: Tensor = ctx.saved_tensors[0]
        return (d_out * positive).mul_(2)


class ZephyraFusionFeedForward(nn.Module):
    """`relu2`: two layers with a squared ReLU between; `swiglu`: a gated unit of three."""

    def __init__(self, config: ZephyraFusionConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up_BTF = self.up_proj(x_BTD)
        hidden_BTF = nn.functional.silu(self.gate_proj(x_BTD)) * up_BTF if self.gated else _SquaredRelu.apply(up_BTF)
        out_BTD: Tensor = self.down_proj(hidden_BTF)
        return out_BTD


class ZephyraFusionDecoderLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: ZephyraFusionConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = ZephyraFusionAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = ZephyraFusionFeedForward(config)

    def forward(self, x_BTD: Tensor, **kwargs: Any) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), **kwargs)
        out_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out_BTD


class ZephyraFusionPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to save, load, initialise and run the model."""

    config: ZephyraFusionConfig
    config_class = ZephyraFusionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ZephyraFusionDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights, and ones in the norms."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)


class ZephyraFusionModel(ZephyraFusionPreTrainedModel):
    """The stack of decoder layers: token ids in, hidden states out."""

    def __init__(self, config: ZephyraFusionConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ZephyraFusionDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = ZephyraFusionRotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Shapes: `input_ids` and `position_ids` [B, T]; `attention_mask` [B, S] or, ready-made, [B, 1, T, S]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x_BTD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + x_BTD.shape[1], device=x_BTD.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(x_BTD, position_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotary=rotary, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values)


class ZephyraFusionForCausalLM(ZephyraFusionPreTrainedModel, GenerationMixin):
    """Zephyra Fusion with its output head, tied to the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ZephyraFusionConfig) -> None:
        super().__init__(config)
        self.model = ZephyraFusionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] (of the last `logits_to_keep` tokens; 0 for all) and, given `labels`, the mean loss."""
        output = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(output.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=output.past_key_values)
