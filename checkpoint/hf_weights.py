"""Weights as the safetensors files of a Hugging Face model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from triplane.checkpoint.errors import CheckpointError
from triplane.model.config import ModelConfig
from triplane.model.hf import from_hf_name, to_hf_name
from triplane.model.transformer import Transformer

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHARD_BYTES = 5_000_000_000
"""Tensor bytes in one file; more are spread over several, with an index."""


def write_weights(weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, folder: Path) -> None:
    """Writes the model's `weights`, by our names, cast to `dtype`; holds one shard at a time."""
    with torch.device("meta"):
        sizes = {name: p.nbytes for name, p in Transformer(config).to(dtype).named_parameters()}
    shards = _shards(sizes)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else _SINGLE
        # Copied, since safetensors refuses tensors that share memory.
        tensors = {to_hf_name(name): weights[name].to(dtype, copy=True).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # else the owner's alone
        files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


class FolderWeights(Mapping[str, Tensor]):
    """The weights of a folder by our names, read when they are asked for; holds none of them."""

    def __init__(self, folder: Path):
        try:
            self._files = _files(folder)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: no readable {_INDEX} or {_SINGLE}: {error}") from error
        self._hf_names = {from_hf_name(name): name for name in self._files}

    def __getitem__(self, name: str) -> Tensor:
        hf_name = self._hf_names[name]
        path = self._files[hf_name]
        try:
            with safe_open(path, framework="pt") as file:
                weight: Tensor = file.get_tensor(hf_name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {hf_name} is unreadable: {error}") from error
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._hf_names)

    def __len__(self) -> int:
        return len(self._hf_names)


def _files(folder: Path) -> dict[str, Path]:
    """The file of each weight, by Hugging Face's names."""
    if (folder / _INDEX).exists():
        names = json.loads((folder / _INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in names.items()}
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / _SINGLE)


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
