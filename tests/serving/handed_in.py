"""Adapters as somebody hands them in, and ways in which they may be spoilt."""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from ray.serve.grpc_util import gRPCInputStream

from cluster.errors import CorruptArtifact, IncompatibleAdapter, InvalidInput, ZephyraError
from deployments.protos import zephyra_pb2 as pb
from tests.nano import nano_base

TAX = ["How do I file my income tax return?", "When is the tax declaration due?", "Which tax bracket am I in?"]


def peft_folder(root: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter for the root's base as PEFT saves it, with random B."""
    # Here, so that tests without an adapter do not pay for the import.
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, "init_lora_weights": False, **config}
    get_peft_model(nano_base(root).model, LoraConfig(**options)).save_pretrained(folder)
    return folder


def _nan(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    factors = safetensors.torch.load_file(file)
    next(iter(factors.values()))[0, 0] = torch.nan
    safetensors.torch.save_file(factors, file)


def _foreign_layer(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    factors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name.replace("layers.0", "layers.9"): f for name, f in factors.items()}, file)


def _option(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, name: value}))

    return change


REFUSED: dict[str, tuple[Callable[[Path], object], type[ZephyraError], str]] = {
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        InvalidInput,
        "adapter_model.safetensors in",
    ),
    "NaN": (_nan, CorruptArtifact, "NaN or infinity"),
    "a layer that is not there": (_foreign_layer, IncompatibleAdapter, "which this base does not have"),
    "DoRA": (_option("use_dora", True), IncompatibleAdapter, "use_dora"),
    "another base": (
        lambda f: (f / "zephyra.json").write_text('{"base_fingerprint": "0000000000000000"}'),
        IncompatibleAdapter,
        "trained on base 0000000000000000",
    ),
    "half a file": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{}"),
        CorruptArtifact,
        "header",
    ),
}


FORM_FILES = {
    "adapter_config": "adapter_config.json",
    "adapter_model": "adapter_model.safetensors",
    "zephyra": "zephyra.json",
}
"""Fields of a form and of gRPC's messages, and the files they carry."""

PIECE_BYTES = 5000


def form_of(adapter: Path) -> dict[str, bytes]:
    """The files of an adapter as a form sends them; those that are not there are left out."""
    return {part: (adapter / name).read_bytes() for part, name in FORM_FILES.items() if (adapter / name).is_file()}


def messages(
    name: str, adapter: Path, examples: Sequence[str] = (), expected_generation: int | None = None
) -> Iterator[pb.AddDomainRequest]:
    """An adapter as a gRPC client sends it, in pieces."""
    yield pb.AddDomainRequest(domain=pb.NewDomain(name=name, expected_generation=expected_generation))
    for prompt in examples:
        yield pb.AddDomainRequest(examples=pb.Examples(prompts=[prompt]))
    for part, content in form_of(adapter).items():
        for start in range(0, len(content), PIECE_BYTES):
            yield pb.AddDomainRequest(**{part: content[start : start + PIECE_BYTES]})


def stream_of(name: str, adapter: Path, *args: Any, **options: Any) -> "gRPCInputStream[pb.AddDomainRequest]":
    """The same as Serve hands it to the Gateway."""

    async def sent() -> AsyncIterator[pb.AddDomainRequest]:
        for message in messages(name, adapter, *args, **options):
            yield message

    return gRPCInputStream(sent())
