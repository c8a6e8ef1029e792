"""Where a stage computes, and in which numbers. Knows nothing of what is trained."""

import torch

from cluster.config import Device, TrainingDtype
from cluster.errors import InvalidInput


def device_of(name: Device) -> torch.device:
    """The device of this name. Raises `InvalidInput` where this process has none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("The device is cuda, and this process sees no GPU; use cpu, or a machine that has one.")
    return torch.device(name)


def dtype_for(wanted: TrainingDtype, device: torch.device) -> torch.dtype:
    """The numbers that layers multiply; with `auto` bfloat16 where the device has instructions for it."""
    if wanted == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are computed as such there, and not put together from wider ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
