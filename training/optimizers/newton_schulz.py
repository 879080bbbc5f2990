"""The orthogonal factor of a matrix by Newton-Schulz iterations, which are products alone."""

from itertools import chain, islice, repeat
from typing import Literal

from torch import Tensor

_EPS = 1e-7
_CLASSIC = (3.4445, -4.775, 2.0315)
"""Jordan et al. 2024: singular values end between 0.7 and 1.2."""
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
"""Amsel et al. 2025: the best quintic at each iteration for singular values from 1e-3 to 1; later ones are the last."""
_POLAR_EXPRESS_END = (1.875, -1.25, 0.375)
_SAFETY = 1.01
"""Rounding in bf16 may push singular values past 1, where a polynomial may diverge; so each is of a smaller matrix."""


def orthogonal(x_MN: Tensor, coefficients: Literal["polar_express", "classic"], iterations: int) -> Tensor:
    """Returns about U V' for each matrix x = U S V' of a batch, in its dtype."""
    tall = x_MN.shape[-2] > x_MN.shape[-1]
    if tall:
        x_MN = x_MN.mT  # the products are of the shorter side
    safety = _SAFETY if coefficients == "polar_express" else 1.0
    x_MN = x_MN / (x_MN.norm(dim=(-2, -1), keepdim=True) * safety).clamp(min=_EPS)
    for a, b, c in _steps(coefficients, iterations):
        gram_MM = x_MN @ x_MN.mT
        x_MN = a * x_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ x_MN
    return x_MN.mT if tall else x_MN


def _steps(coefficients: str, iterations: int) -> list[tuple[float, float, float]]:
    if coefficients == "classic":
        return [_CLASSIC] * iterations
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS]
    return list(islice(chain(safe, repeat(_POLAR_EXPRESS_END)), iterations))
