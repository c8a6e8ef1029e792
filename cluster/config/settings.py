"""What all settings have in common.

Pydantic models with unknown keys refused, frozen, composed and never inherited from one another.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Device = Literal["cpu", "cuda"]

Quantization = Literal["int8", "int4"]
"""A form of a base with integer weights, beside its floats."""


class Settings(BaseModel):
    """Some settings; those that do not exist are refused, those that do never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
