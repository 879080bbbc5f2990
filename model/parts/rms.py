"""RMSNorm (Zhang and Sennrich 2019): divides by the root mean square."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from triplane.model.parts.norm import Mean, Norm
from triplane.model.weights import Axis, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import NormModule


class RmsNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    kind: Literal["rms"] = "rms"
    """RMSNorm."""
    eps: PositiveFloat = 1e-5
    """Added to the mean square."""
    unit_offset: bool = False
    """Multiply by 1 + weight, in fp32, as Gemma does."""

    def weights(self, *axes: Axis) -> Iterator[Weight]:
        yield Weight("weight", axes, 0.0 if self.unit_offset else 1.0, "vector")

    def forward(self, m: NormModule, x: Tensor, mean: Mean | None) -> Tensor:
        from torch.nn.functional import rms_norm

        weight = m.use("weight")
        if self.unit_offset:
            return self._normalized(x.float(), mean).mul(1 + weight.float()).to(x.dtype)
        if mean is None and weight.dim() == 1:
            return rms_norm(x, x.shape[-1:], weight, self.eps)
        return self._normalized(x, mean) * weight

    def _normalized(self, x: Tensor, mean: Mean | None) -> Tensor:
        from torch.nn.functional import rms_norm

        if mean is None:
            return rms_norm(x, x.shape[-1:], None, self.eps)
        wide = x.float()
        return (wide * (mean(wide.square()) + self.eps).rsqrt()).to(x.dtype)
