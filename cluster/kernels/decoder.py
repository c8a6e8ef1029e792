"""A Hugging Face decoder as the native kernels run it: weights packed, one call for a whole step.

Which decoders these are is read off their modules, and proven at load: the model's own forward pass must give the same
logits. Knows nothing of requests. Letters: T tokens, S sequences, D hidden size, H head size, V vocabulary, L logits.
"""

import ctypes
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.kernels import library as native
from cluster.kernels.packed import PackedMatrix, RawMatrix, joined

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 16
SITES_PER_BLOCK = 4
"""Products of a block: qkv, out, up (gate and up), down."""

_GATED_SILU, _SQUARED_RELU = 0, 1
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on the position alone."""
_PROBE_TOKENS = 24
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Norm of the difference of two forward passes over the norm of one: roundings only."""


@dataclass(frozen=True, slots=True)
class Site:
    """A product of the model: the linear layers that read the same rows, side by side."""

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    inputs: int


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a forward pass reads."""

    token_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    sequences_T: NDArray[np.int64]
    """Which row of `blocks_SB` a token belongs to."""
    blocks_SB: NDArray[np.int64]
    """The KV blocks of each sequence, in order of position."""
    read_from_L: NDArray[np.int64]
    """The tokens whose logits are wanted."""


class NativeDecoder:
    """The packed weights of a decoder and its KV cache. Made by `native_decoder`."""

    def __init__(self, model: PreTrainedModel, library: ctypes.CDLL, max_tokens: int, num_kv_blocks: int) -> None:
        """Packs the weights of `model`, which keeps its own until `take_over`."""
        self.library = library
        self._dtype: torch.dtype = model.dtype
        self._is_bf16 = int(model.dtype == torch.bfloat16)
        self._kept: list[Tensor] = []
        """Keys and values."""
        self._kept_weights: list[Tensor] = []
        """Norms: all else that the structs below point to."""
        self._packed: list[PackedMatrix] = []
        self._memory = native.LargePages(library)
        self._modules: list[Any] = []
        """Those whose weights are packed."""
        self._source = model
        decoder: Any = model.base_model
        self.sites: list[Site] = []
        self._cosines, self._sines = _angles(decoder.rotary_emb, max_tokens)
        self._heads = _heads(decoder.layers[0].self_attn)
        self.kv_block_bytes = kv_block_bytes(model)
        embeddings: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self._head = self._matrix([head])
        # Tied: one packed matrix serves as both.
        tied = _weight(head) is _weight(embeddings)
        self._embeddings = self._head if tied else self._matrix([embeddings])
        self._modules.append(embeddings)
        blocks = (native.Block * len(decoder.layers))()
        for index, layer in enumerate(decoder.layers):
            blocks[index] = self._block(layer, f"{_prefix(model)}layers.{index}", num_kv_blocks)
        self._vocabulary = int(self._head.struct.outputs)
        self._hidden = int(self._head.struct.inputs)
        gated = hasattr(decoder.layers[0].mlp, "gate_proj")
        self._blocks = blocks
        self._model = native.Model(
            num_blocks=len(blocks),
            hidden=self._hidden,
            between=blocks[0].down.inputs,
            activation=_GATED_SILU if gated else _SQUARED_RELU,
            norm_epsilon=_epsilon(decoder.norm),
            heads=self._heads,
            blocks=blocks,
            last_norm=self._keep(decoder.norm.weight),
            head=self._head.struct,
        )

    def run(self, given: StepInput, mixtures: native.Mixtures) -> Tensor:
        """One forward pass: writes keys and values of all tokens, returns logits fp32 [L, V]."""
        x_TD = self._embeddings.rows(torch.from_numpy(given.token_ids_T))
        logits_LV = torch.empty(len(given.read_from_L), self._vocabulary)
        step = native.Step(
            tokens=native.Tokens(
                count=len(given.token_ids_T),
                positions=given.positions_T.ctypes.data,
                sequences=given.sequences_T.ctypes.data,
                table=given.blocks_SB.ctypes.data,
                table_width=given.blocks_SB.shape[1],
            ),
            x=x_TD.data_ptr(),
            mixtures=mixtures,
            read_from=given.read_from_L.ctypes.data,
            num_logits=len(given.read_from_L),
            logits=logits_LV.data_ptr(),
        )
        self.library.zephyra_run(ctypes.byref(self._model), ctypes.byref(step), torch.get_num_threads(), self._is_bf16)
        return logits_LV

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights, packed, norms and biases included."""
        return sum(tensor.nbytes for tensor in self._kept_weights) + sum(p.num_bytes for p in self._packed)

    def take_over(self) -> None:
        """Free the weights that the model still has beside the packed ones: it cannot run any more."""
        for module in self._modules:
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
            else:
                module.matrix.to("meta")
        # What is left would keep the whole file mapped that it came from.
        for tensor in (*self._source.parameters(), *self._source.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.clone()

    def _block(self, layer: Any, name: str, num_kv_blocks: int) -> native.Block:
        attention, feed_forward = layer.self_attn, layer.mlp
        qkv = {f"{name}.self_attn.{part}": getattr(attention, part) for part in ("q_proj", "k_proj", "v_proj")}
        parts = ("gate_proj", "up_proj") if hasattr(feed_forward, "gate_proj") else ("up_proj",)
        up = {f"{name}.mlp.{part}": getattr(feed_forward, part) for part in parts}
        rotates = bool(getattr(attention, "use_rope", True))
        heads = self._heads
        shape = (num_kv_blocks, heads.keys, BLOCK_TOKENS)
        # Not zeroed: what no token wrote is never read, and memory that is never touched is never taken.
        keys = torch.empty(*shape, heads.size, dtype=self._dtype)
        values = torch.empty(*shape, heads.rounded, dtype=self._dtype)
        self._kept += [keys, values]
        return native.Block(
            attention_norm=self._keep(layer.input_layernorm.weight),
            feed_forward_norm=self._keep(layer.post_attention_layernorm.weight),
            qkv=self._site(qkv),
            out=self._site({f"{name}.self_attn.o_proj": attention.o_proj}),
            up=self._site(up),
            down=self._site({f"{name}.mlp.down_proj": feed_forward.down_proj}),
            heads=native.HeadWeights(
                q_norm=self._keep(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
                k_norm=self._keep(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
                cosines=self._cosines.data_ptr() if rotates else None,
                sines=self._sines.data_ptr() if rotates else None,
            ),
            cache=native.Cache(keys=keys.data_ptr(), values=values.data_ptr()),
        )

    def _site(self, layers: dict[str, Any]) -> native.Matrix:
        linears = list(layers.values())
        self.sites.append(Site(tuple(layers), tuple(linear.out_features for linear in linears), linears[0].in_features))
        return self._matrix(linears).struct

    def _matrix(self, modules: list[Any]) -> PackedMatrix:
        """Pack the weights of these modules one below the other."""
        biases = [getattr(module, "bias", None) for module in modules]
        bias_O = None
        if any(bias is not None for bias in biases):
            widths = [_num_outputs(module) for module in modules]
            filled = [torch.zeros(w) if bias is None else bias.float() for bias, w in zip(biases, widths, strict=True)]
            bias_O = torch.cat(filled)
        packed = PackedMatrix(
            self.library, joined([_raw(module) for module in modules]), bias_O, self._dtype, self._memory
        )
        self._packed.append(packed)
        self._modules += modules
        return packed

    def _keep(self, weights: Tensor) -> int:
        """The address of a copy in fp32, contiguous, that lives as long as this."""
        self._kept_weights.append(weights.detach().to(torch.float32, copy=True).contiguous())
        return self._kept_weights[-1].data_ptr()


def _raw(module: Any) -> RawMatrix:
    """The weight of a linear layer or of embeddings, quantized or not."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return RawMatrix(module.weight.detach())
    return RawMatrix(module.matrix.values, module.matrix.scales)


def _weight(module: Any) -> object:
    """What tied modules share."""
    return module.weight if isinstance(module, nn.Linear | nn.Embedding) else module.matrix


def _num_outputs(module: Any) -> int:
    return int(module.num_embeddings if hasattr(module, "num_embeddings") else module.out_features)


def kv_block_bytes(model: PreTrainedModel) -> int:
    """Memory of 16 tokens' keys and values in all layers."""
    layers: Any = model.base_model.layers
    heads = _heads(layers[0].self_attn)
    return int(BLOCK_TOKENS * heads.keys * (heads.size + heads.rounded) * model.dtype.itemsize * len(layers))


def _heads(attention: Any) -> native.Heads:
    size = int(attention.head_dim)
    return native.Heads(
        queries=attention.q_proj.out_features // size,
        keys=attention.k_proj.out_features // size,
        size=size,
        rounded=-(-size // 16) * 16,
        scaling=attention.scaling,
        epsilon=_epsilon(attention.q_norm) if hasattr(attention, "q_norm") else 0.0,
    )


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _prefix(model: PreTrainedModel) -> str:
    """`model.` for a causal language model: what comes before `layers` in the names of its layers."""
    return f"{model.base_model_prefix}." if model.base_model is not model else ""


def _angles(rotary: nn.Module, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [max_tokens, H]."""
    cosines, sines = rotary(torch.zeros(1), torch.arange(max_tokens).unsqueeze(0))
    return cosines[0].contiguous(), sines[0].contiguous()


@torch.no_grad()
def native_decoder(model: PreTrainedModel, max_tokens: int, num_kv_blocks: int) -> NativeDecoder | None:
    """`model` packed for the native kernels, which takes its weights away; None, and unchanged, where they cannot.

    The model's own forward pass is the proof: both must give the same logits for a few tokens.
    """
    if (why := why_not_native(model)) is not None:
        logger.info("The engine runs this base in torch, since %s.", why)
        return None
    if (library := native.native_library()) is None:
        return None
    num_tokens = min(_PROBE_TOKENS, max_tokens)
    ids_T = np.arange(1, num_tokens + 1, dtype=np.int64) * 7919 % model.config.vocab_size
    expected_LV = model(torch.from_numpy(ids_T)[None], use_cache=False).logits[0].float()
    decoder = NativeDecoder(model, library, max_tokens, num_kv_blocks)
    positions_T = np.arange(num_tokens, dtype=np.int64)
    blocks_SB = np.arange(-(-num_tokens // BLOCK_TOKENS), dtype=np.int64)[None]
    given = StepInput(ids_T, positions_T, np.zeros(num_tokens, dtype=np.int64), blocks_SB, positions_T)
    logits_LV = decoder.run(given, native.Mixtures())
    difference = float((logits_LV - expected_LV).norm() / expected_LV.norm())
    if difference < _PROBE_TOLERANCE[model.dtype]:
        decoder.take_over()
        return decoder
    logger.warning("The engine runs this base in torch: in the native kernels its logits differ by %.2g.", difference)
    return None


def why_not_native(model: PreTrainedModel) -> str | None:
    """What keeps the native kernels from running this model, in a clause; None when nothing is seen that does."""
    if model.device.type != "cpu":
        return f"it is on {model.device.type}"
    if model.dtype not in _PROBE_TOLERANCE:
        return f"its weights are {model.dtype}"
    decoder: Any = model.base_model
    if not all(hasattr(decoder, name) for name in ("layers", "norm", "rotary_emb")):
        return "its parts have other names than Llama's"
    if getattr(decoder.rotary_emb, "rope_type", "default") not in _FIXED_ROTARY:
        return f"its rotary embedding is {decoder.rotary_emb.rope_type}"
    shapes = set()
    for layer in decoder.layers:
        if {name for name, _ in layer.named_children()} != {
            "input_layernorm",
            "self_attn",
            "post_attention_layernorm",
            "mlp",
        }:
            return "its blocks hold other parts than Llama's"
        if not _is_known_attention(layer.self_attn) or not _is_known_feed_forward(layer.mlp):
            return "its blocks hold other layers than Llama's"
        shapes.add(
            (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features, layer.mlp.up_proj.out_features)
        )
    return None if len(shapes) == 1 else "its blocks differ in shape"


def _is_known_attention(attention: nn.Module) -> bool:
    names = {name for name, _ in attention.named_children()}
    linears = {"q_proj", "k_proj", "v_proj", "o_proj"}
    return (
        linears <= names <= linears | {"q_norm", "k_norm"}
        and len(names) != len(linears) + 1
        and all(_is_linear(getattr(attention, name)) for name in linears)
    )


def _is_known_feed_forward(feed_forward: Any) -> bool:
    linears = {name for name, child in feed_forward.named_children() if _is_linear(child)}
    if linears == {"gate_proj", "up_proj", "down_proj"}:
        activation = getattr(feed_forward, "act_fn", None)
        return getattr(feed_forward, "gated", isinstance(activation, nn.SiLU | type(None)) or _is_silu(activation))
    return linears == {"up_proj", "down_proj"} and getattr(feed_forward, "gated", None) is False


def _is_linear(module: Any) -> bool:
    """A plain linear layer, or one over a quantized matrix."""
    return type(module) is nn.Linear or hasattr(getattr(module, "matrix", None), "scales")


def _is_silu(activation: Any) -> bool:
    x = torch.linspace(-4, 4, 9)
    return bool(torch.allclose(activation(x), nn.functional.silu(x)))
