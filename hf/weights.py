"""Writes weights as the safetensors files of a Hugging Face model; `folder.py` reads them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from triplane.hf.names import OUTPUT_BIAS, to_hf_name
from triplane.model.config import ModelConfig
from triplane.model.transformer import Transformer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHARD_BYTES = 5_000_000_000
"""Tensor bytes in one file; more are spread over several, with an index."""


def write_weights(weights: Mapping[str, Tensor], config: ModelConfig, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes the model's `weights`, by our names, cast to `dtype`; holds one shard at a time.

    With `qkv_bias`, the output biases that a Llama has besides are written as zeros.
    """
    with torch.device("meta"):
        sizes = {name: p.nbytes for name, p in Transformer(config).to(dtype).named_parameters()}
    zeros = [f"blocks.{number}.{OUTPUT_BIAS}" for number in range(config.n_layers if config.attention.qkv_bias else 0)]
    sizes |= dict.fromkeys(zeros, config.dim * dtype.itemsize)
    shards = _shards(sizes)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        # Copied, since safetensors refuses tensors that share memory.
        ours = [name for name in names if name not in zeros]
        tensors = {to_hf_name(name): weights[name].to(dtype, copy=True).contiguous() for name in ours}
        tensors |= {to_hf_name(name): torch.zeros(config.dim, dtype=dtype) for name in names if name in zeros}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # else the owner's alone
        files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
