"""The choices that define how one model spreads over ranks."""

from typing import Literal

from pydantic import BaseModel, Field, PositiveInt

BUCKET_ELEMENTS = 500_000_000
"""Gradients that ZeRO reduces at once: DeepSpeed's default. It allocates the bucket whole in every step, so a small
model takes a smaller one."""


class ParallelConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """The axes: tp x cp x pp x dp ranks."""

    tp: PositiveInt = 1
    """Tensor: ranks that split each weight matrix. Keep within one machine."""
    sequence_parallel: bool = False
    """Split the tokens over the tp ranks where weights are not split: less activation memory, the same traffic."""
    cp: PositiveInt = 1
    """Context: ranks that split the tokens of a micro-batch, for long sequences."""
    cp_method: Literal["ulysses", "ring"] = "ulysses"
    """`ulysses`: all-to-all, so that each rank attends with a share of the heads. `ring`: keys and values travel,
    for more ranks than heads."""
    pp: PositiveInt = 1
    """Pipeline: ranks that split the layers."""
    virtual_stages: PositiveInt = 1
    """Stages on each pipeline rank; more shorten the wait at a step's ends, and send more often."""
    dp: PositiveInt | Literal["auto"] = "auto"
    """Data: ranks that split the batch. `auto`: as many as the ranks at hand allow."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage over dp x cp. 0: all is replicated. 1: each rank keeps a share of fp32 weights and moments; 2: of
    gradients too; 3: of weights too."""
    offload_optimizer: bool = False
    """Keep fp32 weights and moments in the host's memory, and update there; slow."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it. `selective`: all but products and attention. `full`: all."""
    compile: bool = False
    """Compile each block: minutes at the start, faster steps after."""
    fp8: bool = False
    """Multiply in 8-bit floats inside blocks; needs a GPU of compute capability 8.9 or more."""
    timeout_s: float = Field(default=600.0, gt=0, le=1e7)
    """How long a collective waits for a rank before it fails."""

    @property
    def ranks_of_one(self) -> int:
        """Ranks that together hold one copy of the model and read one batch."""
        return self.tp * self.pp * self.cp

    def describe(self) -> str:
        """`tp 2 + sequence x pp 2 x 2 stages x dp 2, zero 1`; axes of one rank are left out."""
        axes = [
            f"tp {self.tp}" + (" + sequence" if self.sequence_parallel else "") if self.tp > 1 else "",
            f"cp {self.cp} {self.cp_method}" if self.cp > 1 else "",
            f"pp {self.pp}" + (f" x {self.virtual_stages} stages" if self.virtual_stages > 1 else "")
            if self.pp > 1
            else "",
            f"dp {self.dp}" if self.dp != 1 else "",
        ]
        options = [
            f"zero {self.zero}",
            "offload" if self.offload_optimizer else "",
            f"recompute {self.recompute}" if self.recompute != "none" else "",
            "compile" if self.compile else "",
            "fp8" if self.fp8 else "",
        ]
        return ", ".join(filter(None, [" x ".join(filter(None, axes)) or "one rank", *options]))
