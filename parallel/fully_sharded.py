"""Spreads weights, gradients, masters and moments over dp x cp: ZeRO stage 3, by torch's FSDP2 (`fully_shard`).

A module's weights are gathered before its forward and before its backward pass, while others compute, and freed
afterwards; the gradients of each micro-batch are averaged in fp32 into this rank's shards.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor

from triplane.model.describe import model_weights
from triplane.model.transformer import Transformer
from triplane.parallel.mesh import Mesh, Spread
from triplane.parallel.placement import Fragment, LocalModel, Placement, spread_of
from triplane.parallel.update import OptimizerKind, Piece, Update


def shard_weights(model: Transformer, mesh: Mesh, dtype: torch.dtype, *, offload: bool) -> None:
    """Makes each parameter of `model` (on meta, in fp32) this rank's rows of it, zeros; forward gets them in `dtype`.

    What is gathered at once: a block, the embedding, the head, and the rest; of a block the experts apart, if other
    ranks hold the same ones. With `offload` the rows are on the host.
    """
    options: dict[str, Any] = {
        "mesh": _device_mesh(mesh.spread, mesh),
        # Casting inputs would round the tables of positions, which are in fp32.
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy(),
    }
    tied = _tie(model)
    # A tied table, which both ends use, is gathered with the rest, from the first use to the last.
    ends = (None, None) if tied else (model.embedding, model.head)
    first, last = ([] if end is None else [fully_shard(end, **options)] for end in ends)
    where = _places(model, mesh)
    blocks = (fully_shard(block, shard_placement_fn=where.get, **options) for block in model.blocks.values())
    units = [*first, *blocks, *last]
    for end in (*first, *last):
        end.set_unshard_in_backward(False)  # backward needs no table: the head computes its gradients in forward
    # Backward gathers a unit while the one after it computes. By itself FSDP2 would follow the order of the forward
    # passes, which a pipeline interleaves: the first unit would gather what ran before it.
    for before, unit in zip([*units[:1], *units], units):
        unit.set_modules_to_backward_prefetch([before])
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "logits")
    model.to_empty(device=torch.device("cpu") if offload else mesh.device)
    if tied:
        _tie(model)  # a module that moves gets parameters of its own
    for parameter in model.parameters():
        _shard(parameter).zero_()


def _places(model: Transformer, mesh: Mesh) -> dict[nn.Parameter, ShardPlacementResult]:
    """Returns where the parameters are sharded that other ranks hold than hold the rest: the experts."""
    if mesh.expert_spread is None:
        return {}
    weights = model_weights(model.config)
    ranks = _device_mesh(mesh.expert_spread, mesh)
    # These classes are private, but fully_shard documents their use. One object, since it compares them by identity.
    info = FSDPMeshInfo(ranks, 0) if ranks.ndim == 1 else HSDPMeshInfo(ranks, 1, replicate_mesh_dim=0)
    place = ShardPlacementResult(None, info)
    named = model.blocks.named_parameters(prefix="blocks")
    return {parameter: place for name, parameter in named if spread_of(weights[name], mesh) is mesh.expert_spread}


def _device_mesh(spread: Spread, mesh: Mesh) -> DeviceMesh:
    """Returns the ranks that shard together, or in two dims these and the ranks that hold the same shards."""
    shards, copies = spread.shards, spread.copies
    group = shards.group or dist.new_group([mesh.rank], use_local_synchronization=True)
    if copies.size == 1:
        return DeviceMesh.from_group(group, mesh.device.type)
    assert copies.group is not None
    ranks = torch.tensor(dist.get_process_group_ranks(spread.holders.group)).view(copies.size, shards.size)
    groups, names = [copies.group, group], ("copies", "shards")
    return DeviceMesh.from_group(groups, mesh.device.type, mesh=ranks, mesh_dim_names=names)


def _tie(model: Transformer) -> bool:
    """Ties the head to the embedding if the config says so and this rank has both; returns whether it did."""
    if not model.config.tie_embeddings or model.embedding is None or model.head is None:
        return False
    model.head.weight = model.embedding.weight
    return True


def _shard(tensor: Tensor) -> Tensor:
    """Returns this rank's rows, in the memory of `tensor`."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


class FullyShardedOptimizer:
    """Updates this rank's shards, which FSDP2 keeps in fp32."""

    def __init__(self, local: LocalModel, kind: OptimizerKind, mesh: Mesh):
        self.module = local.module
        self.stages = local.stages
        self.mesh = mesh
        self.placements = local.placements
        self.update = Update(kind, list(_pieces(local.placements)), mesh)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradients of `loss`, averaged over the ranks that hold the same weights.

        Its reductions end with it: one that went on would keep a whole table of gradients through the next forward.
        """
        loss.backward()  # type: ignore[no-untyped-call]

    def accumulation(self) -> AbstractContextManager[None]:
        """Wraps a schedule's backward passes; does nothing, since each reduces its gradients."""
        return nullcontext()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns this rank's rows of the gradient, averaged over the ranks that hold the same weights."""
        if parameter.grad is None:  # the copy of a table on a stage without layers
            parameter.grad = torch.zeros_like(parameter)
        return _shard(parameter.grad)

    def step(self, learning_rate: float) -> Tensor:
        """Applies and clears the gradients; returns their global norm before clipping.

        Applies nothing if the norm is not finite.
        """
        self._give_gradients()
        return self.update.apply(learning_rate)

    def discard(self) -> Tensor:
        """Clears the gradients; returns their global norm."""
        self._give_gradients()
        return self.update.discard()

    def _give_gradients(self) -> None:
        """Moves the gradients from the parameters to their pieces."""
        for placement, piece in zip(self.placements, self.update.pieces):
            gradient = self.gradient(placement.parameter)
            # Of dp x cp whatever the parameter's own ranks are: each holds a part of the sum over all tokens.
            if (holders := placement.spread.holders.size) < self.mesh.replicas.size:
                gradient *= holders / self.mesh.replicas.size
            piece.weight.grad = gradient.view_as(piece.weight)
            placement.parameter.grad = None

    def fragments(self) -> Iterator[Fragment]:
        """Yields the state on this rank."""
        return self.update.fragments()

    def loaded(self, step: int) -> None:
        """Adopts fragments that were filled with the state after `step` updates."""
        self.update.loaded(step)
        for stage in self.stages:
            assert isinstance(stage, FSDPModule)
            stage.reshard()  # an evaluation leaves what is in no block gathered


def _pieces(placements: list[Placement]) -> Iterator[Piece]:
    """Yields this rank's rows of each parameter, possibly none."""
    for number, placement in enumerate(placements):
        shards, copies = placement.spread.shards, placement.spread.copies
        weight = _shard(placement.parameter)
        yield Piece(
            placement,
            weight if weight.shape == placement.local else weight.view(-1),
            start=placement.cuts(shards.size)[shards.rank],
            copies=copies.size,
            writes=number % copies.size == copies.rank,  # the copies take turns in writing parameters
            cut=shards if shards.size > 1 else None,
        )
