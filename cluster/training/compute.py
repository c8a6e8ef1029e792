"""Where a stage computes, and in which numbers. Knows nothing of what is trained."""

import torch

from cluster.config.settings import Device
from cluster.config.training import StageSettings, TrainingDtype
from cluster.errors import InvalidInput
from cluster.training.run import Run

DTYPES: dict[TrainingDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `auto` becomes one of."""


def device_of(name: Device) -> torch.device:
    """The device of this name. Raises `InvalidInput` where this process has none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("The device is cuda, and this process sees no GPU; use cpu, or a machine that has one.")
    return torch.device(name)


def with_dtype(settings: StageSettings, run: Run) -> StageSettings:
    """The settings with the numbers in place of `auto`: bfloat16 if every worker's device has instructions for it.

    All workers have to call this.
    """
    if settings.recipe.dtype != "auto":
        return settings
    are_all = all(run.workers.each(lambda: multiplies_bfloat16(run.workers.device)))
    dtype: TrainingDtype = "bfloat16" if are_all else "float32"
    if run.workers.is_first:
        run.say(f"layers multiply {dtype}")
    return settings.model_copy(update={"recipe": settings.recipe.model_copy(update={"dtype": dtype})})


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are computed as such there, and not put together from wider ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    # The last is ARM's name for it.
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
