"""Builds AdamW and its parameter groups."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Size, nn

from triplane.training.config import OptimizerConfig


def adamw(config: OptimizerConfig, parameters: Iterable[tuple[nn.Parameter, Size]]) -> torch.optim.AdamW:
    """Builds AdamW; the training loop sets the learning rate at each step."""
    return torch.optim.AdamW(
        decay_groups(parameters),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def decay_groups(parameters: Iterable[tuple[nn.Parameter, Size]]) -> list[dict[str, Any]]:
    """Returns two parameter groups: matrices, with weight decay, and vectors (norms), without.

    Each parameter comes with its full shape, which ZeRO 3 removes from the parameter itself.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter, shape in parameters:
        (matrices if len(shape) > 1 else vectors).append(parameter)
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
