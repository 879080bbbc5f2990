"""No positions (Haviv et al. 2022): the causal mask alone orders the tokens."""

from typing import Literal

from triplane.model.parts.positions import Positions


class NoPositions(Positions):
    """Adds nothing."""

    kind: Literal["none"] = "none"
    """No positions."""
