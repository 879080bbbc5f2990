"""What keeps experts equally busy."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat

from triplane.model.part import Part

STATE = "router.selection_bias"
"""The weight in which `SelectionBias` keeps its state."""


class SequenceLoss(Part):
    """A loss of each sequence (DeepSeek-V3, equations 17 to 20): sum over experts of load times mean score.

    The load, 1 for all if they are equal, has no gradient. A sequence is the widest scope whose loads are known while
    a micro-batch runs, so its loss is the same however many micro-batches and ranks share the batch.
    """

    kind: Literal["loss"] = "loss"
    """A loss of each sequence."""
    weight: NonNegativeFloat = 1e-2
    """Weight of its mean in the loss of each layer; 1e-4 in DeepSeek-V3, 1e-2 in Switch Transformers."""


class SelectionBias(Part):
    """A bias of each expert's score that counts in the selection alone (Wang et al. 2024), as in DeepSeek-V3.

    After each step it falls by `rate` for experts with more than the mean number of the global batch's tokens, and
    rises for those with fewer. It takes no part in gradients.
    """

    kind: Literal["bias"] = "bias"
    """A bias that counts in the selection alone."""
    rate: PositiveFloat = 1e-3
    """Change in each step."""
