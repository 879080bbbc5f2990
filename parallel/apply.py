"""The one place that fixes the order in which parallelism is applied to a model."""

from dataclasses import dataclass

import torch

from triplane.model.config import ModelConfig
from triplane.model.transformer import Transformer
from triplane.parallel.mesh import Mesh
from triplane.parallel.pipeline import TIED_HEAD, cut_stage
from triplane.parallel.placement import Placement, place


@dataclass(frozen=True)
class LocalModel:
    """What this rank holds of the model, uninitialised."""

    module: Transformer
    placements: list[Placement]
    dtype: torch.dtype


def build_local_model(config: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> LocalModel:
    """Builds the whole model on meta and narrows it to this rank's share, in this order:

    1. pipeline: drop the layers of other stages, so that nothing is swapped in vain;
    2. tensor: swap in modules that hold a share of each weight;
    3. materialise that share, uninitialised, and tie the head to the embedding where both are here.

    The optimizer (zero.py or replicated.py) comes last, around the parameters that are left.
    """
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        cut_stage(model, mesh)
        if mesh.tp.size > 1:
            from triplane.parallel.tensor import apply_tensor_parallel

            apply_tensor_parallel(model, mesh)
    model.to_empty(device=mesh.device)
    tied_copy = config.tie_embeddings and model.embedding is None
    if config.tie_embeddings and model.embedding is not None and model.head is not None:
        model.head.weight = model.embedding.weight
    placements = place(model, shapes, TIED_HEAD if tied_copy else {}, mesh)
    return LocalModel(model, placements, dtype)
