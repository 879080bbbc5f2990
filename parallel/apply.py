"""Applies every kind of parallelism to a model, in a fixed order."""

import torch
from torch import Tensor, nn

from triplane.model.compiled import compile_blocks, separate_gradients
from triplane.model.config import ModelConfig
from triplane.model.transformer import Transformer
from triplane.parallel.config import ParallelConfig, Recompute
from triplane.parallel.mesh import Mesh
from triplane.parallel.pipeline import copied_names, cut_stage
from triplane.parallel.placement import LocalModel, Placement, place
from triplane.parallel.recompute import apply_recompute
from triplane.parallel.stages import stage_layers


def build_local_model(
    config: ModelConfig, layout: ParallelConfig, mesh: Mesh, *, dtype: torch.dtype, seq_len: int
) -> LocalModel:
    """Builds the whole model on meta and narrows it to this rank's share, in this order:

    1. pipeline: drop the layers of other stages, so that no later step works on them;
    2. tensor: swap in modules that hold a share of each weight;
    3. experts: narrow each stack of experts to a share;
    4. context: swap in attention over a share of the tokens;
    5. fp8: swap the products of linear layers;
    6. recompute and compile: wrap each block;
    7. materialise the share, or with ZeRO 3 its shard, and tie the head to the embedding if this rank has both.

    The optimizer (sharded.py, zero.py or fully_sharded.py) comes last, around the remaining parameters.
    """
    sharded = layout.shards_weights(mesh.replicas.size)
    count = mesh.pp.size * layout.virtual_stages
    layers = stage_layers(config, count, seq_len)
    stages: list[Transformer] = []
    placements: list[Placement] = []
    states: dict[str, Tensor] = {}
    for number in range(mesh.pp.rank, count, mesh.pp.size):
        with torch.device("meta"):
            model = Transformer(config).to(torch.float32 if sharded else dtype)
            cut_stage(model, layers[number], first=number == 0, last=number == count - 1)
            if mesh.tp.size > 1:
                from triplane.parallel.tensor import apply_tensor_parallel

                apply_tensor_parallel(model, mesh, layout.sequence_parallel)
            if mesh.ep.size > 1:
                from triplane.parallel.experts import apply_expert_parallel

                apply_expert_parallel(model, mesh.ep)
        if mesh.cp.size > 1:
            from triplane.parallel.context import apply_context_parallel

            apply_context_parallel(model, mesh.cp, layout.cp_method)
        if stages and config.positions.every_stage and not sharded:  # one copy, split once, serves the rank's stages
            model.positions = stages[0].positions
        if layout.fp8:
            from triplane.model.fp8 import use_fp8

            use_fp8(model)
        apply_recompute(_recomputed(model, layout, "selective"), "selective")
        if layout.compile:
            compile_blocks(model)
        apply_recompute(_recomputed(model, layout, "full"), "full")
        states |= _take_states(model, mesh)
        local = {name: parameter.shape for name, parameter in model.named_parameters()}
        if sharded:
            from triplane.parallel.fully_sharded import shard_weights

            shard_weights(model, mesh, dtype, offload=layout.offload_optimizer)
        else:
            _materialise(model, mesh)
            if layout.compile:
                separate_gradients(model)
        placed = place(model, mesh, local=local, tied=copied_names(model) if number > 0 else {})
        known = {id(placement.parameter) for placement in placements}
        placements += [placement for placement in placed if id(placement.parameter) not in known]
        stages.append(model)
    return LocalModel(stages, placements, dtype, states)


def _recomputed(model: Transformer, layout: ParallelConfig, how: Recompute) -> list[nn.Module]:
    """Returns the blocks that the layout recomputes so."""
    return [block for number, block in model.blocks.items() if layout.recomputed(int(number)) == how]


def _take_states(model: Transformer, mesh: Mesh) -> dict[str, Tensor]:
    """Makes tensors in fp32 of the parameters that no optimizer updates; returns them by name."""
    states = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                states[f"{path}.{name}"] = torch.zeros(parameter.shape, device=mesh.device)
                setattr(module, name, states[f"{path}.{name}"])
    return states


def _materialise(model: Transformer, mesh: Mesh) -> None:
    model.to_empty(device=mesh.device)
    if model.config.tie_embeddings and model.embedding is not None and model.head is not None:
        model.head.weight = model.embedding.weight
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # padding stays zero; `Engine.initialize` or a checkpoint sets the rest
