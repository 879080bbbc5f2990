"""Initial weights as a pure function of (seed, name, position), so that every layout starts from the same ones."""

import hashlib
import math

import torch
from torch import Tensor

from triplane.model.config import ModelConfig

_ROWS = 1024
"""Rows per generator, so that a rank draws only about the rows it holds."""

_RESIDUAL_WRITERS = ("attention.wo.weight", "feed_forward.w_down.weight")


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

    Norms are ones, biases zeros. Matrices are normal with `init_std`, scaled by 1 / sqrt(2 n_layers) if they write
    to the residual stream (GPT-2).
    """
    if name.endswith(".bias"):
        return torch.zeros(sizes)
    if len(shape) == 1:
        return torch.ones(sizes)
    std = config.init_std / (math.sqrt(2 * config.n_layers) if name.endswith(_RESIDUAL_WRITERS) else 1)
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
