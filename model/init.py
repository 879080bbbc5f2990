"""Initial weights as a pure function of (seed, name, position), so that every layout starts from the same ones."""

import hashlib
import math

import torch
from torch import Tensor

from triplane.model.config import ModelConfig
from triplane.model.describe import model_weights

_ROWS = 1024
"""Rows per generator, so that a rank draws only about the rows it holds."""


def initial_weight(
    config: ModelConfig,
    seed: int,
    name: str,
    *,
    shape: torch.Size,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> Tensor:
    """Returns the part of parameter `name` that starts at `offsets` and spans `sizes`; fp32 on the host.

    Each part says how its weights begin (weights.py).
    """
    init = model_weights(config)[name].init
    if not isinstance(init, str):
        return torch.full(sizes, init)
    std = config.init_std / (math.sqrt(2 * config.n_layers) if init == "residual" else 1)
    if len(shape) == 2:
        return _drawn(seed, name, std, shape=shape, offsets=offsets, sizes=sizes)
    stack = [
        _drawn(seed, f"{name}/{number}", std, shape=shape[1:], offsets=offsets[1:], sizes=sizes[1:])
        for number in range(offsets[0], offsets[0] + sizes[0])
    ]
    return torch.stack(stack) if stack else torch.empty(sizes)


def _drawn(
    seed: int, name: str, std: float, *, shape: torch.Size, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Tensor:
    """Returns a part of a matrix."""
    first, last = offsets[0], offsets[0] + sizes[0]
    columns = slice(offsets[1], offsets[1] + sizes[1])
    part = torch.empty(sizes)
    for start in range(first - first % _ROWS, last, _ROWS):
        rows = torch.empty(min(_ROWS, shape[0] - start), shape[1])
        rows.normal_(0.0, std, generator=_generator(seed, name, start))
        low, high = max(first, start), min(last, start + len(rows))
        part[low - first : high - first] = rows[low - start : high - start, columns]
    return part


def _generator(seed: int, name: str, row: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
