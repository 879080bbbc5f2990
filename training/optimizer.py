"""AdamW, and which parameters it decays."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Size, nn

from triplane.training.config import OptimizerConfig


def adamw(config: OptimizerConfig, parameters: Iterable[tuple[nn.Parameter, Size]]) -> torch.optim.AdamW:
    """Sets all but the learning rate's course, which the training loop gives at each step."""
    return torch.optim.AdamW(
        decay_groups(parameters),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def decay_groups(parameters: Iterable[tuple[nn.Parameter, Size]]) -> list[dict[str, Any]]:
    """Two groups: matrices, decayed as the optimizer is told to; vectors (norms), not decayed.

    Each parameter comes with the shape that it has whole: ZeRO 3 leaves it without one of its own.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter, shape in parameters:
        (matrices if len(shape) > 1 else vectors).append(parameter)
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
