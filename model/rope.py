"""Rotary position embedding (Su et al. 2021), pairs (i, i + K/2), as in Llama's released weights."""

import math

import torch
from torch import Tensor

from triplane.model.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Returns radians per token for each of the head_dim / 2 pairs, after scaling; (K/2,), fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    # Not base**-exponents: this rounds as Llama's code does, which matters at positions over 10^5.
    plain = 1 / config.rope_base**exponents
    return plain if config.rope_scaling is None else _scaled(plain, config.rope_scaling)


def _scaled(plain: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return plain / scaling.factor
    # Llama 3.1 stretches long waves by `factor`, keeps short ones, and blends linearly in between.
    turns = scaling.original_seq_len * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


def rotations(config: ModelConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of each token's angles, (T, 1, K/2) each, fp32."""
    angles = positions_T.float()[:, None] * frequencies(config, positions_T.device)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of each head by its token's angle, in fp32; returns x's dtype."""
    first, second = x_THK.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THK.dtype)
