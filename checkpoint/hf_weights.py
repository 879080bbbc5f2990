"""Weights as the safetensors files of a Hugging Face model."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from triplane.model.config import ModelConfig
from triplane.model.hf import from_hf_name, to_hf_name
from triplane.model.transformer import Transformer

_SHARD_BYTES = 5_000_000_000
"""Tensor bytes in one file; more are spread over several, with an index."""


def write_weights(weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, folder: Path) -> None:
    """Writes the model's `weights`, by our names, cast to `dtype`; holds one shard at a time."""
    with torch.device("meta"):
        sizes = {name: p.nbytes for name, p in Transformer(config).to(dtype).named_parameters()}
    shards = _shards(sizes)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        # Copied, since safetensors refuses tensors that share memory.
        tensors = {to_hf_name(name): weights[name].to(dtype, copy=True).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # else the owner's alone
        files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, by our names."""
    files = sorted(folder.glob("*.safetensors"))
    return {from_hf_name(name): weight for file in files for name, weight in load_file(file).items()}


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
