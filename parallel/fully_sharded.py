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
from torch.distributed.tensor import DTensor

from triplane.model.transformer import Transformer
from triplane.parallel.mesh import Mesh, Spread
from triplane.parallel.placement import Fragment, LocalModel, Placement
from triplane.parallel.update import OptimizerKind, Piece, Update


def shard_weights(model: Transformer, mesh: Mesh, dtype: torch.dtype, *, offload: bool) -> None:
    """Makes each parameter of `model` (on meta, in fp32) this rank's rows of it, zeros; forward gets them in `dtype`.

    What is gathered at once: a block, the embedding, the head, and the rest. With `offload` the rows are on the host.
    """
    options: dict[str, Any] = {
        "mesh": _device_mesh(mesh),
        # Casting inputs would round the tables of positions, which are in fp32.
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy(),
    }
    tied = _tie(model)
    # A tied table, which both ends use, is gathered with the rest, from the first use to the last.
    ends = (None, None) if tied else (model.embedding, model.head)
    first, last = ([] if end is None else [fully_shard(end, **options)] for end in ends)
    units = [*first, *(fully_shard(block, **options) for block in model.blocks.values()), *last]
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


def _device_mesh(mesh: Mesh) -> DeviceMesh:
    """Returns the ranks that shard together, or in two dims these and the ranks that hold the same shards."""
    shards, copies = mesh.spread.shards, mesh.spread.copies
    assert shards.group is not None
    if copies.size == 1:
        return DeviceMesh.from_group(shards.group, mesh.device.type)
    assert copies.group is not None
    ranks = torch.tensor(dist.get_process_group_ranks(mesh.replicas.group)).view(copies.size, shards.size)
    groups, names = [copies.group, shards.group], ("copies", "shards")
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
        self.parameters = [placement.parameter for placement in local.placements]
        self.update = Update(kind, list(_pieces(local.placements, mesh.spread)), mesh)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradients of `loss`, averaged over dp x cp.

        Its reductions end with it: one that went on would keep a whole table of gradients through the next forward.
        """
        loss.backward()  # type: ignore[no-untyped-call]

    def accumulation(self) -> AbstractContextManager[None]:
        """Wraps a schedule's backward passes; does nothing, since each reduces its gradients."""
        return nullcontext()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns this rank's rows of the gradient, averaged over dp x cp."""
        if parameter.grad is None:  # the copy of a table on a stage without layers
            parameter.grad = torch.zeros_like(parameter)
        return _shard(parameter.grad)

    def step(self, learning_rate: float) -> Tensor:
        """Applies and clears the gradients; returns their global norm before clipping.

        Applies nothing if the norm is not finite.
        """
        for parameter, piece in zip(self.parameters, self.update.pieces):
            piece.weight.grad = self.gradient(parameter).view_as(piece.weight)
            parameter.grad = None
        return self.update.apply(learning_rate)

    def fragments(self) -> Iterator[Fragment]:
        """Yields the state on this rank."""
        return self.update.fragments()

    def loaded(self, step: int) -> None:
        """Adopts fragments that were filled with the state after `step` updates."""
        self.update.loaded(step)
        for stage in self.stages:
            assert isinstance(stage, FSDPModule)
            stage.reshard()  # an evaluation leaves what is in no block gathered


def _pieces(placements: list[Placement], spread: Spread) -> Iterator[Piece]:
    """Yields this rank's rows of each parameter, possibly none."""
    shards, copies = spread.shards, spread.copies
    for number, placement in enumerate(placements):
        weight = _shard(placement.parameter)
        yield Piece(
            placement,
            weight if weight.shape == placement.local else weight.view(-1),
            start=placement.cuts(shards.size)[shards.rank],
            copies=copies.size,
            writes=number % copies.size == copies.rank,  # the copies take turns in writing parameters
            cut=shards,
        )
