"""Rotary positions (Su et al. 2021): each pair of a head's dims turns by an angle that grows with the position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from triplane.model.part import Part
from triplane.model.parts.positions import Positions, Tables

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import PositionsModule


class _Scaling(Part):
    """Stretches the wavelengths."""

    @property
    def magnitude(self) -> float:
        """Multiplies queries and keys."""
        return 1.0

    def scaled(self, plain: Tensor, base: float) -> Tensor:
        """Returns the frequencies, radians per token, for the longer context."""
        raise NotImplementedError


class LinearScaling(_Scaling):
    """Divides all frequencies (Chen et al. 2023)."""

    kind: Literal["linear"]
    """Position interpolation."""
    factor: float = Field(gt=1)
    """How many times longer the context becomes."""

    def scaled(self, plain: Tensor, base: float) -> Tensor:
        return plain / self.factor


class Llama3Scaling(_Scaling):
    """Divides low frequencies and blends smoothly into high ones (Llama 3.1)."""

    kind: Literal["llama3"]
    """Llama 3.1's scaling."""
    factor: float = Field(gt=1)
    """How many times longer the context becomes."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths over `original_seq_len / low_freq_factor` are divided by `factor`."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths under `original_seq_len / high_freq_factor` are unchanged."""
    original_seq_len: PositiveInt = 8192
    """Tokens of context before stretching."""

    def scaled(self, plain: Tensor, base: float) -> Tensor:
        turns = self.original_seq_len * plain / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return keep * plain + (1 - keep) * plain / self.factor


class YarnScaling(_Scaling):
    """Divides frequencies that turn seldom within the context, and sharpens attention (Peng et al. 2023)."""

    kind: Literal["yarn"]
    """YaRN."""
    factor: float = Field(gt=1)
    """How many times longer the context becomes."""
    original_seq_len: PositiveInt = 8192
    """Tokens of context before stretching."""
    beta_fast: PositiveFloat = 32.0
    """Frequencies that turn more often within `original_seq_len` are unchanged."""
    beta_slow: PositiveFloat = 1.0
    """Frequencies that turn less often are divided by `factor`."""
    attention_factor: PositiveFloat | None = None
    """Multiplies queries and keys. None: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """True: the blend runs between whole pairs, as in most releases; false in gpt-oss."""

    def scaled(self, plain: Tensor, base: float) -> Tensor:
        import torch

        def pair(turns: float) -> float:
            """Returns the number of the pair that turns so often within the original context."""
            return len(plain) * math.log(self.original_seq_len / (turns * 2 * math.pi)) / math.log(base)

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(plain) - 1)
        high += 0.001 * (low == high)
        stretch = ((torch.arange(len(plain), device=plain.device).float() - low) / (high - low)).clamp(0, 1)
        return plain / self.factor * stretch + plain * (1 - stretch)

    @property
    def magnitude(self) -> float:
        return self.attention_factor or 0.1 * math.log(self.factor) + 1


Scaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class Rotary(Positions):
    """Turns the first dims of queries and keys, in fp32."""

    kind: Literal["rotary"] = "rotary"
    """RoPE."""
    base: PositiveFloat = 10_000.0
    """Wavelengths run from 2 pi to 2 pi `base` tokens (theta)."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of each head's dims that turn, from the first (GPT-NeoX); the others stay."""
    interleaved: bool = False
    """False: dim i turns with i + half (Llama's released weights). True: with its neighbour (the paper, GPT-J)."""
    scaling: Scaling | None = None
    """Stretches the wavelengths, so that a model reads longer contexts. None: positions as trained."""

    def problems(self, dim: int, head_dim: int) -> Iterator[str]:
        turning = self._turning(head_dim)
        if turning % 2 or not turning:
            yield (
                f"rotary positions turn pairs of dims, but head_dim ({head_dim}) x fraction ({self.fraction:g}) is "
                f"{turning}, not an even number"
            )

    def frequencies(self, head_dim: int, positions_T: Tensor) -> Tensor:
        """Returns radians per token for each pair, after scaling; fp32, on the device of `positions_T`."""
        import torch

        turning = self._turning(head_dim)
        exponents = torch.arange(0, turning, 2, dtype=torch.float32, device=positions_T.device) / turning
        # Not base**-exponents: this rounds as Llama's code does, which matters at positions over 10^5.
        plain = 1 / self.base**exponents
        return plain if self.scaling is None else self.scaling.scaled(plain, self.base)

    def tables(self, m: PositionsModule, positions_T: Tensor, longest: int) -> Tables:
        """Returns cosine and sine of each token's angles, (T, 1, pairs) each, fp32."""
        angles = positions_T.float()[:, None] * self.frequencies(m.head_dim, positions_T)
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return (cos, sin) if magnitude == 1 else (cos * magnitude, sin * magnitude)

    def rotate(self, x_THK: Tensor, tables: Tables) -> Tensor:
        import torch

        cos, sin = tables
        turning = 2 * cos.shape[-1]
        own = x_THK[..., :turning]
        halves = (own[..., ::2], own[..., 1::2]) if self.interleaved else own.chunk(2, dim=-1)
        # Widened when apart and rounded before they are joined, so that compiled code writes no wide tensor.
        first, second = (half.float() for half in halves)
        turned = [part.to(x_THK.dtype) for part in (first * cos - second * sin, second * cos + first * sin)]
        parts = [torch.stack(turned, dim=-1).flatten(-2)] if self.interleaved else turned
        if turning < x_THK.shape[-1]:
            parts.append(x_THK[..., turning:])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _turning(self, head_dim: int) -> int:
        return int(head_dim * self.fraction)
