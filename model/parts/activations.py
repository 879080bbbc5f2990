"""Activation functions by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["relu", "relu_squared", "gelu", "gelu_tanh", "gelu_sigmoid", "silu", "sigmoid", "none"]
"""`gelu` is exact (erf), `gelu_tanh` and `gelu_sigmoid` (x sigmoid(1.702 x)) its approximations (Hendrycks and Gimpel
2016); `relu_squared` from Primer (So et al. 2021); `none` makes a gated layer bilinear (Shazeer 2020)."""


def activation(name: Activation) -> Callable[[Tensor], Tensor]:
    """Returns the function of that name."""
    from torch.nn import functional as F

    functions: dict[Activation, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "relu_squared": lambda x: F.relu(x).square(),
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_sigmoid": lambda x: x * (1.702 * x).sigmoid(),
        "silu": F.silu,
        "sigmoid": lambda x: x.sigmoid(),
        "none": lambda x: x,
    }
    return functions[name]
