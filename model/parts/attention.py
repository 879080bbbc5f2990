"""The base of all attention: what it does with queries, keys and values, however a kind makes them of the stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from pydantic import PositiveFloat, PositiveInt

from triplane.model.part import Part
from triplane.model.parts.positions import Positions, Tables
from triplane.model.rule import Rule
from triplane.model.weights import Axis, Cost, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.batch import Batch
    from triplane.model.modules import PartModule


class Attention(Part):
    """Causal softmax attention."""

    kind: str
    n_heads: PositiveInt
    """Query heads."""
    output_bias: bool = False
    """True: the output has a bias, as in GPT-2."""
    window: PositiveInt | None = None
    """Tokens that a token sees, itself included (Mistral). None: all before it."""
    softcap: PositiveFloat | None = None
    """Scores s become softcap tanh(s / softcap), as in Gemma 2. None: any."""
    sinks: bool = False
    """True: each head has a learned score that takes probability and gives nothing (gpt-oss)."""
    scale: PositiveFloat | None = None
    """Multiplies the scores. None: 1 / sqrt(width of a query)."""

    if TYPE_CHECKING:  # fields or properties of a kind

        @property
        def n_kv_heads(self) -> int:
            """Key and value heads."""

        @property
        def head_dim(self) -> int:
            """Width of the queries, keys and values that the kernel reads."""

    @property
    def query_dim(self) -> int:
        """Dims of a query that its product with a key adds up."""
        return self.head_dim

    @property
    def turning_dim(self) -> int:
        """Dims of a head that positions see."""
        return self.head_dim

    def rule(self) -> Rule:
        scale = self.query_dim**-0.5 if self.scale is None else self.scale
        return Rule(scale=scale, window=self.window, softcap=self.softcap)

    def weights(self, dim: int) -> Iterator[Weight]:
        raise NotImplementedError

    def cost(self, dim: int, seq_len: int) -> Cost:
        raise NotImplementedError

    def split_problems(self, tp: int) -> Iterator[str]:
        """Yields why `tp` ranks cannot share the heads."""
        yield from ()

    def shrunken(self, n_heads: int, head_dim: int) -> Self:
        """Returns attention with the same features, but other sizes."""
        raise NotImplementedError

    def forward(self, m: PartModule, x_TD: Tensor, positions: Positions, tables: Tables, batch: Batch) -> Tensor:
        raise NotImplementedError

    def build(self, dim: int) -> PartModule:
        raise NotImplementedError

    def _seen(self, seq_len: int) -> int:
        """Returns the keys that a token sees at most."""
        return seq_len if self.window is None else min(seq_len, self.window)

    def _sinks(self) -> Iterator[Weight]:
        if self.sinks:
            yield Weight("sinks", (Axis("head", self.n_heads),), 0.0, "vector")
