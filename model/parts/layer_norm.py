"""LayerNorm (Ba, Kiros and Hinton 2016): subtracts the mean and divides by the standard deviation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat, model_validator

from triplane.model.parts.norm import Mean, Norm
from triplane.model.weights import Axis, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import NormModule


class LayerNorm(Norm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""

    kind: Literal["layer"] = "layer"
    """LayerNorm."""
    eps: PositiveFloat = 1e-5
    """Added to the variance."""
    gain: bool = True
    """False: no weight, as in OLMo."""
    bias: bool = True
    """False: no bias, as in Cohere."""
    unit_offset: bool = False
    """Multiply by 1 + weight, in fp32, as Nemotron does."""

    @model_validator(mode="after")
    def _bias_needs_gain(self) -> LayerNorm:
        if self.bias and not self.gain:
            raise ValueError("bias = true requires gain = true; set bias = false")
        return self

    def weights(self, *axes: Axis) -> Iterator[Weight]:
        if self.gain:
            yield Weight("weight", axes, 0.0 if self.unit_offset else 1.0, "vector")
        if self.bias:
            yield Weight("bias", axes, 0.0, "vector")

    def forward(self, m: NormModule, x: Tensor, mean: Mean | None) -> Tensor:
        from torch.nn.functional import layer_norm

        weight = m.use("weight") if self.gain else None
        bias = m.use("bias") if self.bias else None
        plain = mean is None and not self.unit_offset and (weight is None or weight.dim() == 1)
        if plain:
            return layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        wide = x.float()
        if mean is None:
            normed = layer_norm(wide, x.shape[-1:], eps=self.eps)
        else:
            centred = wide - mean(wide)
            normed = centred * (mean(centred.square()) + self.eps).rsqrt()
        if weight is not None:
            normed = normed * (weight.float() + self.unit_offset)
        return (normed if bias is None else normed + bias.float()).to(x.dtype)
