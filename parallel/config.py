"""The config table `[parallel]`: how a model spreads over ranks."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, PositiveInt

from triplane.model.part import as_tuple

BUCKET_ELEMENTS = 500_000_000
"""Gradients that ZeRO reduces at once: DeepSpeed's default. It allocates the whole bucket in every step, so a small
model uses a smaller one."""

Recompute = Literal["none", "selective", "full"]


class ParallelConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A layout of tp x cp x pp x dp ranks."""

    tp: PositiveInt = 1
    """Tensor: ranks that split each weight matrix. Keep them on one machine."""
    sequence_parallel: bool = False
    """Split the tokens over the tp ranks where weights are whole: less activation memory, the same traffic."""
    cp: PositiveInt = 1
    """Context: ranks that split the tokens of a micro-batch, for long sequences."""
    cp_method: Literal["ulysses", "ring"] = "ulysses"
    """`ulysses`: an all-to-all gives each rank a share of the heads. `ring`: keys and values travel from rank to rank,
    which allows more ranks than heads."""
    ep: PositiveInt = 1
    """Expert: neighbours of the dp x cp ranks, whose number it divides, that split the experts. No further ranks. ZeRO
    shares an expert among those of its ranks that hold the same."""
    pp: PositiveInt = 1
    """Pipeline: ranks that split the layers."""
    virtual_stages: PositiveInt = 1
    """Stages per pipeline rank; more of them shrink the pipeline bubble and send more often."""
    dp: PositiveInt | Literal["auto"] = "auto"
    """Data: ranks that split the batch. `auto`: as many as the available ranks allow."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage over dp x cp. 0: replicate everything. 1: shard fp32 weights and moments; 2: gradients too; 3: weights
    too."""
    dp_shard: PositiveInt | None = None
    """Ranks of dp x cp that share what ZeRO 1 to 3 shards, neighbours: those of one machine, say. The others hold
    copies, so that only gradients cross machines. none: all."""
    offload_optimizer: bool = False
    """Keep fp32 weights and moments in host memory and update them there; slow."""
    recompute: Annotated[
        Recompute | Annotated[tuple[Recompute, ...], Field(min_length=1)], BeforeValidator(as_tuple)
    ] = "none"
    """Activations that backward recomputes instead of keeping. `selective`: all but products and attention. `full`:
    all. A list is of layers in turn, repeated over the depth: ["full", "none"] recomputes every other one."""
    compile: bool = False
    """Compile each block and the loss: minutes at the start, faster steps afterwards."""
    fp8: bool = False
    """Multiply in 8-bit floats in the linear layers of blocks; routers and routed experts stay in the weights' own
    precision. Requires GPUs of compute capability 8.9 or more."""
    timeout_s: float = Field(default=600.0, gt=0, le=1e7)
    """Seconds a collective waits for a rank before it fails."""

    @property
    def ranks_of_one(self) -> int:
        """tp x pp x cp: the ranks that hold one copy of the model and read one batch."""
        return self.tp * self.pp * self.cp

    def shards_weights(self, replicas: int) -> bool:
        """Returns whether a rank holds a shard of each weight: at ZeRO 3, unless nobody and no host shares it."""
        return self.zero == 3 and (self.shards(replicas) > 1 or self.offload_optimizer)

    def shards(self, replicas: int) -> int:
        """Returns the ranks, of `replicas`, that share the state of the optimizer."""
        return 1 if self.zero == 0 else self.dp_shard or replicas

    def expert_shards(self, replicas: int) -> int:
        """Returns the ranks, of those of `replicas` that hold the same experts, that share the state of these: those
        among `shards`."""
        shards, rest = divmod(self.shards(replicas), self.ep)
        return 1 if rest else shards

    @property
    def recompute_pattern(self) -> tuple[Recompute, ...]:
        """What is recomputed of the layers of one period."""
        return self.recompute if isinstance(self.recompute, tuple) else (self.recompute,)

    def recomputed(self, layer: int) -> Recompute:
        """Returns what is recomputed of a layer, by its number."""
        return self.recompute_pattern[layer % len(self.recompute_pattern)]

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed runs the optimizer, on the host: all of dp x cp must share all of its state."""
        return self.offload_optimizer and self.zero < 3 and self.ep == 1 and self.dp_shard is None

    def describe(self) -> str:
        """`tp 2 + sequence x pp 2 x 2 stages x dp 2, zero 1`; omits axes of one rank."""
        axes = [
            f"tp {self.tp}" + (" + sequence" if self.sequence_parallel else "") if self.tp > 1 else "",
            f"cp {self.cp} {self.cp_method}" if self.cp > 1 else "",
            f"pp {self.pp}" + (f" x {self.virtual_stages} stages" if self.virtual_stages > 1 else "")
            if self.pp > 1
            else "",
            f"dp {self.dp}" if self.dp != 1 else "",
            f"ep {self.ep}" if self.ep > 1 else "",
        ]
        options = [
            f"zero {self.zero}" + (f" over {self.dp_shard}" if self.dp_shard else ""),
            "offload" if self.offload_optimizer else "",
            f"recompute {'/'.join(self.recompute_pattern)}" if {*self.recompute_pattern} != {"none"} else "",
            "compile" if self.compile else "",
            "fp8" if self.fp8 else "",
        ]
        return ", ".join(filter(None, [" x ".join(filter(None, axes)) or "one rank", *options]))
