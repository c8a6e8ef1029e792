"""Adapters on disk: PEFT's own layout, so that its adapters work here and ours load there.

A folder holds `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, and `zephyra.json` with what
PEFT has no place for: the base's fingerprint and the checksum. Nothing else is read, and nothing is unpickled.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from cluster.errors import CorruptArtifact, IncompatibleAdapter, ZephyraError
from cluster.lora.packed_adapter import PackedAdapter, write_adapter
from cluster.lora.weights import AdapterWeights, Factors

_PREFIX = "base_model.model."

_UNMIXABLE = {
    "use_dora": "DoRA rescales the whole weight",
    "modules_to_save": "it replaces whole modules",
    "lora_bias": "it trains biases of B",
    "layer_replication": "it repeats layers",
    "trainable_token_indices": "it retrains token embeddings",
    "target_parameters": "it changes parameters that are no linear layer's",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "arrow_config": "it routes between other adapters",
    "use_qalora": "it pools the layer's input",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it changes the base's weights too",
    "monteclora_config": "it draws its factors at random",
}
"""PEFT options under which an adapter is more than a sum of B A, so that no mixture of it would be exact."""

_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT initialisations that take the adapter's first value off the base's weights, or replace them."""

_ATOM = r"(?:[\w-]|\\?\.|\[[\w-]+\]|\([\w-]+(?:\|[\w-]+)+\))"
_NAME = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")
_WIDE = re.compile(rf"\^?{_ATOM}*(?:\.\*{_ATOM}*)?\$?")
_MAX_PATTERN_CHARACTERS, _MAX_CHOICES, _MAX_WIDE_PATTERNS = 256, 2, 16
"""Of a pattern in `alpha_pattern`; and how many of them may be more than a name."""


def unpack(packed: PackedAdapter, dtype: torch.dtype, device: torch.device | str = "cpu") -> AdapterWeights:
    """The factors of a packed adapter. Raises `IncompatibleAdapter` or `CorruptArtifact`."""
    with _as_corrupt():
        tensors = safetensors.torch.load(packed.tensors.tobytes())
        factors = _factors(json.loads(packed.config_json), tensors, dtype, torch.device(device))
    weights = AdapterWeights(factors, packed.base_fingerprint)
    weights.check_finite()
    return weights


def unpack_layers(
    file: Path, packed: PackedAdapter, layers: Collection[str], dtype: torch.dtype
) -> AdapterWeights | None:
    """As `unpack`, of some layers only, read from the `file` that was packed; None if it holds none of them."""
    with _as_corrupt(), safetensors.safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys() if _layer_of(key) in layers}  # noqa: SIM118
        if not tensors:
            return None
        factors = _factors(json.loads(packed.config_json), tensors, dtype, torch.device("cpu"))
    weights = AdapterWeights(factors, packed.base_fingerprint)
    weights.check_finite()
    return weights


def layer_sizes(file: Path) -> dict[str, tuple[int, int, int]]:
    """Output width, input width and rank of each layer, by the file's header alone. Raises `CorruptArtifact`."""
    with _as_corrupt(), safetensors.safe_open(file, framework="np") as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
        return {
            _layer_of(key): (shapes[key.replace(".lora_A.", ".lora_B.")][0], num_in, rank)
            for key, (rank, num_in) in shapes.items()
            if ".lora_A." in key
        }


def _layer_of(key: str) -> str:
    return key.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".lora_A").removesuffix(".lora_B")


@contextmanager
def _as_corrupt() -> Iterator[None]:
    """Whatever a strange file makes of the lines inside is an error of ours."""
    try:
        yield
    except ZephyraError:
        raise
    except Exception as error:
        raise CorruptArtifact(f"The adapter is not in PEFT's layout: {error}.") from error


def save(folder: Path, weights: AdapterWeights, base_model_name: str, metadata: dict[str, Any] | None = None) -> None:
    """Write `weights` into `folder` so that both PEFT and `pack` read them. `metadata` (JSON) is kept for people."""
    data, config = _serialized(weights, base_model_name)
    write_adapter(folder, json.dumps(config, indent=2), weights.base_fingerprint, data, metadata or {})


def packed(weights: AdapterWeights) -> PackedAdapter:
    """`weights` as `save` and `pack` would give them: the inverse of `unpack`, for what is on no disk."""
    data, config = _serialized(weights, base_model_name="")
    return PackedAdapter(json.dumps(config), weights.base_fingerprint, np.frombuffer(data, dtype=np.uint8))


def _serialized(weights: AdapterWeights, base_model_name: str) -> tuple[bytes, dict[str, Any]]:
    """The tensors' file and the configuration.

    PEFT knows one alpha/r per adapter and exceptions by name; each layer's scale is written as alpha = scale * r.
    """
    tensors = {}
    for name, f in weights.factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = f.a_RI.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = f.b_OR.contiguous()
    first = next(iter(weights.factors.values()))
    alpha = first.scale * first.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(weights.factors),
        "rank_pattern": {n: f.rank for n, f in weights.factors.items() if f.rank != first.rank},
        "alpha_pattern": {n: f.scale * f.rank for n, f in weights.factors.items() if f.scale * f.rank != alpha},
    }
    return safetensors.torch.save(tensors, metadata={"format": "pt"}), config


def _factors(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Factors]:
    if config.get("peft_type") != "LORA":
        raise IncompatibleAdapter(f"The adapter's peft_type is {config.get('peft_type')!r}; only LORA can be mixed.")
    for option, why in _UNMIXABLE.items():
        if config.get(option):
            raise IncompatibleAdapter(f"The adapter sets {option}: {why}, so no mixture would be exact; train without.")
    if config.get("bias", "none") != "none":
        raise IncompatibleAdapter(f"The adapter trains biases (bias={config['bias']!r}); train with bias='none'.")
    if str(config.get("init_lora_weights", "")).lower().startswith(_MOVES_THE_BASE):
        raise IncompatibleAdapter(
            f"The adapter was started by {config['init_lora_weights']!r}, which moves the base's own weights; save it "
            "again with PEFT's path_initial_model_for_weight_conversion."
        )
    alphas = _alpha_patterns(config)
    factors = {}
    for key in sorted(key for key in tensors if key.endswith(".lora_A.weight")):
        name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        other = key.replace(".lora_A.", ".lora_B.")
        if other not in tensors:
            raise CorruptArtifact(f"The adapter has A but no B for {name}.")
        a, b = tensors.pop(key), tensors.pop(other)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] or not (a.is_floating_point() and b.is_floating_point()):
            raise IncompatibleAdapter(
                f"The adapter's factors for {name} are {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}; "
                "expected two matrices of floating-point numbers."
            )
        a, b = a.to(device, dtype), b.to(device, dtype)
        factors[name] = Factors(a, b, _scale(config, alphas, name, a.shape[0]))
    if tensors or not factors:
        left = ", ".join(sorted(tensors)[:3]) or "no factors at all"
        raise IncompatibleAdapter(f"The adapter holds {left}; expected only lora_A and lora_B of linear layers.")
    return factors


def _alpha_patterns(config: dict[str, Any]) -> list[tuple[re.Pattern[str], float]]:
    """As PEFT reads them: each is a regular expression on the end of a layer's name, and the first that fits counts.

    Who hands in an adapter writes them, and some expressions take longer than anyone can wait. So only names are taken,
    as PEFT writes them, and a few with one `.*`, sets like `[0-9]` and two choices like `(q|k)`: none can be slow.
    """
    patterns = config.get("alpha_pattern") or {}
    num_wide = sum(not _NAME.fullmatch(pattern) for pattern in patterns)
    for pattern in patterns:
        is_short = len(pattern) <= _MAX_PATTERN_CHARACTERS and pattern.count("(") <= _MAX_CHOICES
        if not (is_short and _WIDE.fullmatch(pattern)):
            raise IncompatibleAdapter(
                f"The adapter's alpha_pattern holds {pattern[:100]!r}; expected names of layers of at most "
                f"{_MAX_PATTERN_CHARACTERS} characters, with one '.*', sets such as '[0-9]' and {_MAX_CHOICES} choices "
                "such as '(q|k)' at most."
            )
    if num_wide > _MAX_WIDE_PATTERNS:
        raise IncompatibleAdapter(
            f"The adapter's alpha_pattern holds {num_wide} patterns that are not names; expected at most "
            f"{_MAX_WIDE_PATTERNS}: name the layers."
        )
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]


def _scale(config: dict[str, Any], alphas: Sequence[tuple[re.Pattern[str], float]], name: str, rank: int) -> float:
    alpha = next((value for pattern, value in alphas if pattern.match(name)), config["lora_alpha"])
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)
