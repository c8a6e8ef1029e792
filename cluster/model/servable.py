"""Whether a base can be served, found out before its weights are loaded: from its files, and from its structure.

The structure is asked, not the name: the model is made without numbers (torch's meta device) and one forward pass is
taken as the engine takes it, with an attention that only notes how it is called.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from cluster.errors import InvalidInput, NotTrained
from cluster.model.quantized_artifact import is_quantized

SERVED = (
    "Zephyra serves decoders whose every layer has full attention through transformers' AttentionInterface and plain "
    "linear layers, such as Llama, Qwen2, Qwen3 or SmolLM3: choose one of those"
)
_PROBE = "zephyra_probe"
_PROBE_TOKENS = 8
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_UNKNOWN_TO_THE_ENGINE = ("softcap", "s_aux", "position_bias", "attention_bias")
"""What some models hand to their attention beside queries, keys and values, and the engine's does not apply."""


def check_servable(folder: Path, max_context_tokens: int | None = None) -> None:
    """Raise `InvalidInput` or `NotTrained`, which say why, unless the base in `folder` can be served as it is.

    Up to `max_context_tokens`, by default all that the base was made for. Reads JSON and the tokenizer, no weights;
    nothing that lies beside them is run.
    """
    config = _config(folder)
    if not is_quantized(folder):
        _check_weights(folder)
    check_structure(config, max_context_tokens)
    _check_tokenizer(folder, config)


def check_structure(config: PreTrainedConfig, max_context_tokens: int | None = None) -> None:
    """The part of `check_servable` that is about the model itself."""
    if config.is_encoder_decoder:
        raise _refusal(config, "an encoder with a decoder")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(config, "not a causal language model of text")
    if config.get_text_config() is not config:
        raise _refusal(config, "made of more than a language model, such as an encoder of images")
    try:
        model = skeleton_of(copy.deepcopy(config))  # of its own: which attention it has is written there
    # Whatever a configuration that does not fit together makes of the model's own code.
    except Exception as error:
        raise _refusal(config, f"of a shape that cannot be built ({type(error).__name__}: {error})") from error
    if (why := _unfit_blocks(model)) is not None:
        raise _refusal(config, why)
    if not getattr(model, "_supports_attention_backend", False):
        raise _refusal(config, "a model whose layers do not all attend through transformers' AttentionInterface")
    max_tokens = max_context_tokens or getattr(config, "max_position_embeddings", None)
    if max_tokens is None:
        raise _refusal(config, "a model whose config.json has no max_position_embeddings")
    check_attention(model, max_tokens)
    if (why := _unfit_attention(model, max_tokens)) is not None:
        raise _refusal(config, why)


def check_attention(model: PreTrainedModel, max_tokens: int) -> None:
    """Raise `InvalidInput` unless every layer attends to all of `max_tokens` tokens, by what the configuration says."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and window < max_tokens
    default_kind = "sliding_attention" if windowed else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [default_kind])
    if kinds - ({"full_attention"} if windowed else {"full_attention", "sliding_attention"}):
        raise _refusal(
            config,
            f"a model whose layers use {', '.join(sorted(kinds))} (window {window})",
            ", or a context no longer than the window (max_context_tokens in the engine's settings)",
        )


def attention_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Key-value heads of a layer and their size, as the KV cache of the runner in torch has them."""
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return heads, int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration without its weights: the names and shapes of its layers, at no cost of memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _refusal(config: PreTrainedConfig, why: str, alternative: str = "") -> InvalidInput:
    return InvalidInput(f"The base is of type {config.model_type!r}, {why}; {SERVED}{alternative}.")


def _config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise NotTrained(f"There is no model in {folder.name!r}; name a folder with a config.json.")
    try:
        content = json.loads((folder / "config.json").read_text())
        kind = content.get("model_type")
    except (ValueError, AttributeError) as error:
        raise InvalidInput(f"The config.json in {folder.name!r} cannot be read ({error}); restore it.") from error
    if "quantization_config" in content:
        method = content["quantization_config"].get("quant_method", "some method")
        raise InvalidInput(
            f"The base is quantized already, by {method}; name its float model, and use `zephyra quantize` on that."
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        own_code = ", which comes with code of its own that is never run" if "auto_map" in content else ""
        raise InvalidInput(
            f"The base is of type {kind!r}, which this version of transformers does not know{own_code}; {SERVED}."
        ) from error
    return config


def _check_weights(folder: Path) -> None:
    """Raise `InvalidInput` unless all weights are there as safetensors."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{index.name} in {folder.name!r} cannot be read; restore it.") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if not missing:
        return
    if index.is_file():
        raise InvalidInput(f"{folder.name!r} lacks {missing[0]}, which {index.name} names; copy or download it again.")
    pickled = next((file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLES), None)
    held = f"only {pickled}" if pickled else "no weights"
    raise InvalidInput(
        f"{folder.name!r} holds {held}; expected model.safetensors: pickled weights are never read, so save the model "
        "again with transformers' save_pretrained."
    )


def _check_tokenizer(folder: Path, config: PreTrainedConfig) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    # Tokenizers of all kinds are read there, and each fails in its own way.
    except Exception as error:
        raise InvalidInput(
            f"{folder.name!r} holds no tokenizer that can be read ({type(error).__name__}); put tokenizer.json and "
            "tokenizer_config.json beside the weights."
        ) from error
    if len(tokenizer.all_special_ids) > largest:
        raise InvalidInput(f"{folder.name!r} holds no tokenizer; put tokenizer.json and tokenizer_config.json there.")
    if largest >= config.vocab_size:
        raise InvalidInput(
            f"The tokenizer in {folder.name!r} has ids up to {largest}, the model embeds {config.vocab_size} tokens; "
            "resize the model's embeddings, or take the tokenizer that belongs to it."
        )


def _unfit_blocks(model: PreTrainedModel) -> str | None:
    """What in the numbered blocks no adapter for linear layers could reach, in a clause; None if nothing is found."""
    for name, module in model.named_modules():
        if not any(part.isdecimal() for part in name.split(".")):
            continue
        if isinstance(module, Conv1D):
            return "a model with Conv1D instead of linear layers"
        if isinstance(module, nn.Conv1d):
            return "a state-space or convolutional model, in part or in whole"
        own = dict(module.named_parameters(recurse=False))
        if name.endswith(".experts") or any(parameter.ndim > 2 for parameter in own.values()):
            return "a mixture of experts"
    return None


@dataclass
class _Noted:
    """How attention was called in one forward pass."""

    layers: list[int] = field(default_factory=list)
    shapes: set[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=set)
    """Heads and size of the keys, and of the values."""
    windows: set[int] = field(default_factory=set)
    extras: set[str] = field(default_factory=set)
    """Arguments that the engine's attention would not apply."""
    is_causal: bool = True


def _unfit_attention(model: PreTrainedModel, max_tokens: int) -> str | None:
    """What the engine's attention cannot do for this model, in a clause; None when one forward pass shows nothing."""
    noted = _Noted()
    model.eval().set_attn_implementation(_PROBE)
    ids_BT = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta")
    positions_BT = torch.arange(_PROBE_TOKENS, device="meta").unsqueeze(0)
    keep = torch.tensor([0, _PROBE_TOKENS - 1], device="meta")
    try:
        with torch.no_grad(), torch.device("meta"):
            output = model(
                input_ids=ids_BT, position_ids=positions_BT, use_cache=False, logits_to_keep=keep, step=noted
            )
    # Models of all kinds are run here, and each fails in its own way.
    except Exception as error:
        return f"a model whose forward pass cannot be taken as the engine takes it ({type(error).__name__})"
    config = model.config
    if sorted(noted.layers) != list(range(config.num_hidden_layers)):
        return "a model whose layers do not each attend once through transformers' AttentionInterface"
    if not noted.is_causal:
        return "an encoder: its tokens see those after them"
    if any(window < max_tokens for window in noted.windows):
        return f"a model whose layers use sliding attention (window {min(noted.windows)})"
    if noted.extras:
        return f"a model whose attention takes {', '.join(sorted(noted.extras))}, which the engine's does not"
    expected = attention_shape(config)
    if noted.shapes != {(expected, expected)} or getattr(config, "kv_lora_rank", None):
        return "a model whose keys and values are compressed, or differ in shape between layers"
    if tuple(output.logits.shape) != (1, len(keep), config.vocab_size):
        return "a model that does not give the logits of chosen tokens alone (logits_to_keep)"
    return None


def _note(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    step: _Noted | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention that computes nothing. Queries [B, N, T, H], keys and values [B, K, T, H]; returns [B, T, N, H]."""
    output_BTNH = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))
    if step is None:
        # The model does not hand on what its caller says of the step: the layer will be missed at the end.
        return output_BTNH, None
    step.layers.append(module.layer_idx)
    step.shapes.add(((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])))
    step.windows |= set() if sliding_window is None else {sliding_window}
    step.extras |= _given(kwargs) | (set() if attention_mask is None else {"a mask"})
    step.is_causal &= bool(getattr(module, "is_causal", True))
    return output_BTNH, None


def _given(kwargs: Mapping[str, Any]) -> set[str]:
    return {name for name in _UNKNOWN_TO_THE_ENGINE if kwargs.get(name) is not None}


AttentionInterface.register(_PROBE, _note)
