"""AdamW, and which parameters it decays."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from triplane.training.config import OptimizerConfig


def adamw(config: OptimizerConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """Sets all but the learning rate's course, which the training loop gives at each step."""
    return torch.optim.AdamW(
        decay_groups(named_parameters),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Two groups: matrices, decayed as the optimizer is told to; vectors (norms), not decayed."""
    parameters = [parameter for _, parameter in named_parameters]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
