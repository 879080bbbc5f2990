"""Writes weights as the safetensors files of a Hugging Face model; `folder.py` reads them."""

import json
from collections.abc import Mapping, Set
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from triplane.hf.tensors import Stored
from triplane.storage.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHARD_BYTES = 5_000_000_000
"""Tensor bytes in one file; more are spread over several, with an index."""


def write_weights(
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Stored],
    folder: Path,
    *,
    dtype: torch.dtype,
    zeros: Set[str] = frozenset(),
) -> None:
    """Writes `tensors` from our `weights`, cast to `dtype`, and zeros for `zeros`; holds one shard at a time."""
    shards = _shards({name: prod(stored.shape) * dtype.itemsize for name, stored in tensors.items()})
    files: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        content = {name: _written(tensors[name], weights, dtype=dtype, zeros=zeros) for name in names}
        save_file(content, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # else the owner's alone
        files |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in content.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _written(stored: Stored, weights: Mapping[str, Tensor], *, dtype: torch.dtype, zeros: Set[str]) -> Tensor:
    """Returns a tensor of its own memory, since safetensors refuses those that share it."""
    parts = [torch.zeros(w.shape) if w.name in zeros else weights[w.name] for w in stored.weights]
    for part, weight in zip(parts, stored.weights):
        if tuple(part.shape) != weight.shape:
            raise ModelError(f"{weight.name} is {tuple(part.shape)}, but the config makes it {weight.shape}.")
    return stored.joined(parts).to(dtype, copy=True).contiguous()


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names, in order, of each file; a weight larger than a shard has one of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > _SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
