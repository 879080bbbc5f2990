"""The choices that define how one model spreads over ranks."""

from typing import Literal

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt


class ParallelConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """The axes: tp x pp x dp ranks."""

    tp: PositiveInt = 1
    """Tensor: ranks that split each weight matrix. Keep within one machine."""
    pp: PositiveInt = 1
    """Pipeline: stages that split the layers."""
    dp: PositiveInt | Literal["auto"] = "auto"
    """Data: ranks that split the batch. `auto`: as many as the ranks at hand allow."""
    zero: Literal[0, 1] = 1
    """ZeRO stage over dp. 0: replicated optimizer. 1: each dp rank keeps a share of the fp32 weights and moments."""
    timeout_s: PositiveFloat = Field(default=600.0)
    """How long a collective waits for a rank before it fails."""
