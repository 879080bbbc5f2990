"""Turns a Hugging Face folder into a checkpoint of weights, once it is proven to compute what the folder does."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from triplane.checkpoint.errors import CheckpointError
from triplane.checkpoint.hf_weights import FolderWeights
from triplane.checkpoint.manifest import Manifest, write_manifest
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.tensors import write_tensors
from triplane.checkpoint.verify import ExportReport, probe, probe_logits, verify
from triplane.checkpoint.weights import CheckpointWeights
from triplane.data.files import sync
from triplane.model.config import ModelConfig
from triplane.model.hf import from_hf_config
from triplane.parallel.placement import Fragment


@dataclass(frozen=True)
class Import:
    """What was imported."""

    model: ModelConfig
    report: ExportReport


def import_hf(folder: Path, out: Path) -> Import:
    """Writes the checkpoint `out`, at step 0 and without moments, from the weights of `folder`; loads in every layout.

    `out` appears once its logits are those of `folder` as triplane and, where it is installed, transformers
    read it. Raises CheckpointError, and leaves nothing, if one differs or `out` exists. Holds one weight at a
    time while it writes, the whole model in fp32 while it compares.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; remove it or give another folder.")
    hf = _read_config(folder)
    config = from_hf_config(hf)
    weights = FolderWeights(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        temporary = Path(beside, out.name)
        temporary.mkdir()
        boxes, sizes = [], {}
        for name, weight in weights.items():
            data = weight.float().contiguous()
            path = temporary / f"{name}.safetensors"
            fragment = Fragment("weight", name, data.shape, (0,) * data.dim(), data, primary=True)
            written, sizes[path.name] = write_tensors(path, [fragment])
            boxes += written
        run = {"model": config.model_dump(mode="json"), "imported_from": str(folder)}
        progress = {"step": 0, "consumed_sequences": 0, "tokens_seen": 0, "validation_loss": None}
        write_manifest(temporary, Manifest({**progress, "run": run}, boxes, sizes))
        tokens_BS = probe(config, hf["max_position_embeddings"])
        logits_TV = probe_logits(config, CheckpointWeights(Checkpoint(temporary)), tokens_BS)
        report = verify(folder, tokens_BS, logits_TV, tokenizer=None)
        temporary.rename(out)
        sync(out.parent)
    return Import(config, report)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        hf: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; give a Hugging Face folder") from error
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*needed, "rms_norm_eps", "max_position_embeddings"):
        if key not in hf:
            raise CheckpointError(f"{path}: no {key}; this model reads Llama's config")
    return hf
