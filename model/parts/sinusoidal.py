"""Sinusoidal positions (Vaswani et al. 2017, section 3.5), added to the embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from triplane.model.parts.positions import Positions

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import PositionsModule


class SinusoidalPositions(Positions):
    """Sines and cosines of dim / 2 wavelengths, in fp32."""

    in_embedding: ClassVar[bool] = True
    kind: Literal["sinusoidal"] = "sinusoidal"
    """Sinusoidal positions."""
    base: PositiveFloat = 10_000.0
    """Wavelengths run from 2 pi to 2 pi `base`."""
    interleaved: bool = True
    """True: sine and cosine alternate, wavelength i is base^(2i/dim) (the paper). False: all sines, then all cosines,
    wavelength i is base^(i/(dim/2 - 1)) (tensor2tensor, Whisper)."""

    def problems(self, dim: int, head_dim: int) -> Iterator[str]:
        if dim % 2:
            yield f"sinusoidal positions are pairs of sine and cosine, but dim ({dim}) is odd"

    def embed(self, m: PositionsModule, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        import torch

        half = x_TD.shape[1] // 2
        steps = half if self.interleaved else max(1, half - 1)
        exponents = torch.arange(half, dtype=torch.float32, device=x_TD.device) / steps
        angles = positions_T.float()[:, None] * self.base**-exponents
        waves = (angles.sin(), angles.cos())
        added = torch.stack(waves, dim=-1).flatten(1) if self.interleaved else torch.cat(waves, dim=-1)
        return (x_TD.float() + added).to(x_TD.dtype)
