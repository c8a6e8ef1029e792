"""A quantized base on disk: the float base's own JSON files, `quantized.safetensors`, and `quantization.json`, which
names the base it was made of. It is another form of that base, not another base: the same adapters fit.

Loading makes the model without numbers and fills in the integers: the float weights are never in memory.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from cluster.config.settings import Quantization
from cluster.errors import CorruptArtifact, InvalidInput
from cluster.model.quantization import QuantizedMatrix, quantize_model

_TENSORS, _OURS = "quantized.safetensors", "quantization.json"
_FORMAT = 1
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Configuration and tokenizer; weights and whatever else lies beside them stay where they are."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `quantization.json` says of the tensors beside it."""

    quantization: Quantization
    base_fingerprint: str
    """Of the float base these weights stand for: adapters of that one fit."""
    sha256: str
    """Of the tensors' file."""


def quantized_folder(base_folder: Path, quantization: Quantization) -> Path:
    """Where the quantized form of a base is looked for: beside it, `base/3` and `base/3-int8`."""
    return base_folder.with_name(f"{base_folder.name}-{quantization}")


def is_quantized(folder: Path) -> bool:
    """Whether `folder` holds a quantized base."""
    return (folder / _OURS).is_file()


def read_manifest(folder: Path) -> Manifest:
    """What a quantized base says of itself. Raises `CorruptArtifact`."""
    try:
        content = json.loads((folder / _OURS).read_text())
        if content.pop("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        manifest = Manifest(**content)
        if manifest.quantization not in get_args(Quantization):
            raise ValueError(f"there is no quantization {manifest.quantization!r}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CorruptArtifact(
            f"The quantized base {folder.name!r} has no {_OURS} that can be read ({why}); quantize the base again."
        ) from error


def save_quantized(
    model: PreTrainedModel, quantization: Quantization, source: Path, base_fingerprint: str, folder: Path
) -> None:
    """Quantize `model`, which was loaded from `source`, in place and write it into `folder`, an empty one."""
    _without_numbers(source, quantization, torch.float32)  # raises for a base that could not be loaded again
    quantize_model(model, quantization)
    tensors = {name: tensor.contiguous() for name, tensor in _named_tensors(model).items()}
    for name in (name for name in tensors if name.endswith(".scales")):
        tensors[name] = tensors[name].bfloat16()
    safetensors.torch.save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix in COPIED_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    manifest = Manifest(quantization, base_fingerprint, _sha256(folder / _TENSORS))
    (folder / _OURS).write_text(json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=2))


def load_quantized(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `folder`; norms, biases and scales in `dtype`. Raises `CorruptArtifact`, or `InvalidInput` for a
    dtype that cannot hold the scales.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise InvalidInput(f"A quantized base was asked for in {dtype}; load it in torch.bfloat16 or torch.float32.")
    manifest = read_manifest(folder)
    tensors = _read_tensors(folder, manifest)
    model = _without_numbers(folder, manifest.quantization, dtype)
    wanted = _named_tensors(model)
    if different := sorted(wanted.keys() ^ tensors.keys()):
        raise CorruptArtifact(
            f"The quantized base {folder.name!r} {'lacks' if different[0] in wanted else 'has a strange'} "
            f"{different[0]}: its tensors do not belong to its config.json; quantize the base again."
        )
    for name, tensor in tensors.items():
        expected = wanted[name]
        both_float = tensor.is_floating_point() and expected.is_floating_point()
        if tensor.shape != expected.shape or not (both_float or tensor.dtype == expected.dtype):
            raise CorruptArtifact(
                f"{name} of the quantized base {folder.name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{'floats' if expected.is_floating_point() else expected.dtype} {tuple(expected.shape)}; quantize the "
                "base again."
            )
        tensors[name] = tensor.to(expected.dtype)
    # Not strict: a tied head shares the embeddings' matrix, and what is shared is stored once.
    model.load_state_dict(tensors, strict=False, assign=True)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _read_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    try:
        if _sha256(folder / _TENSORS) != manifest.sha256:
            raise CorruptArtifact(
                f"The tensors of the quantized base {folder.name!r} are not what was written; quantize the base again."
            )
        tensors: dict[str, Tensor] = safetensors.torch.load_file(folder / _TENSORS)
        return tensors
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CorruptArtifact(
            f"The tensors of the quantized base {folder.name!r} cannot be read ({why}); quantize the base again."
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _without_numbers(folder: Path, quantization: Quantization, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `folder` describes, quantized, its parameters without memory; its rotary tables are real."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    quantize_model(model, quantization, QuantizedMatrix.unfilled)
    stored = model.state_dict().keys()
    for name, module in list(model.named_modules()):
        if all(f"{name}.{key}" in stored for key, _ in module.named_buffers(recurse=False)):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _made_anew(name, module))
    return model


def _made_anew(name: str, module: nn.Module) -> nn.Module:
    """A module of tables that follow from the configuration and are in no file, such as rotary frequencies."""
    if any(True for _ in module.parameters()) or not isinstance(getattr(module, "config", None), PreTrainedConfig):
        raise InvalidInput(
            f"{name} ({type(module).__name__}) keeps tables that are in no file and follow from more than its "
            "configuration; quantization does not know this architecture, serve it as it is."
        )
    made: nn.Module = type(module)(module.config)
    return made


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers by name; one that several modules share, once, under its first name."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor.detach()
    return named
