"""Builds AdamW and its parameter groups."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from triplane.training.config import OptimizerConfig


def adamw(config: OptimizerConfig, parameters: Iterable[tuple[nn.Parameter, str]]) -> torch.optim.AdamW:
    """Builds AdamW; the training loop sets the learning rate at each step."""
    return torch.optim.AdamW(
        decay_groups(parameters),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def decay_groups(parameters: Iterable[tuple[nn.Parameter, str]]) -> list[dict[str, Any]]:
    """Returns parameter groups by the roles that come with the parameters: matrices and tables, with weight decay, and
    vectors (norms, biases), without; a network without vectors has one group.
    """
    decayed: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter, role in parameters:
        (vectors if role == "vector" else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
