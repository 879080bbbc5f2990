"""Bugs, one or more for each axis and part of the proof, with a layout in which each shows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import planted_expert_bugs
import planted_further_bugs
import pytest
import torch
from planted_expert_bugs import IN_GROUPS, ONE_SHARED
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from triplane.model.batch import Batch
from triplane.model.modules import WeightsModule, unchanged
from triplane.parallel import (
    bucket,
    engine,
    fully_sharded,
    megatron,
    ring,
    stages,
    tensor,
    ulysses,
    update,
)
from triplane.parallel.engine import Engine
from triplane.parallel.fully_sharded import FullyShardedOptimizer
from triplane.parallel.sharded import ShardedOptimizer
from triplane.parallel.update import Piece
from triplane.parallel.whole import WholeMatrices
from triplane.parallel.zero import ZeroOptimizer
from triplane.training.optimizers.adamw import AdamW


def _unsummed(x: torch.Tensor, mesh: Any) -> torch.Tensor:
    return x


def _without_sum_over_tp_of_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor.megatron, "copy_to_tp", _unsummed)


def _with_scores_for_padding(patch: pytest.MonkeyPatch) -> None:
    swapped = tensor.VocabParallelHead.__init__

    def unmasked(self: Any, *args: Any) -> None:
        swapped(self, *args)
        self.used = len(self.weight)

    patch.setattr(tensor.VocabParallelHead, "__init__", unmasked)


def _with_layers_of_the_wrong_stage(patch: pytest.MonkeyPatch) -> None:
    right = stages.stage_layers
    patch.setattr("triplane.parallel.apply.stage_layers", lambda *args: [*right(*args)[1::-1], *right(*args)[2:]])


def _with_batched_sends(patch: pytest.MonkeyPatch) -> None:
    built = megatron.Pipeline.__init__

    def batched(self: Any, *args: Any, **options: Any) -> None:
        built(self, *args, **options)
        self.config.overlap_p2p_comm, self.config.batch_p2p_comm = False, True

    patch.setattr(megatron.Pipeline, "__init__", batched)


def _without_the_copied_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "_sum_copied_gradients", lambda self: None)


def _with_the_tied_copy_counted_twice(patch: pytest.MonkeyPatch) -> None:
    wrapped = ShardedOptimizer.__init__

    def counted(self: Any, local: Any, *args: Any, **options: Any) -> None:
        for number, placed in enumerate(local.placements):
            local.placements[number] = replace(placed, primary=placed.primary or placed.tied_copy)
        wrapped(self, local, *args, **options)

    patch.setattr(ShardedOptimizer, "__init__", counted)


def _with_an_offloaded_tied_copy_counted_twice(patch: pytest.MonkeyPatch) -> None:
    wrapped = ZeroOptimizer.__init__

    def counted(self: Any, local: Any, *args: Any, **options: Any) -> None:
        for number, placed in enumerate(local.placements):
            local.placements[number] = replace(placed, tied_copy=False)
        wrapped(self, local, *args, **options)

    patch.setattr(ZeroOptimizer, "__init__", counted)


def _with_the_mean_over_own_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Engine,
        "_count_targets",
        lambda self, batches: sum((b.targets_T != engine.IGNORED_TARGET).sum() for b in batches) * self.mesh.dp.size,
    )


def _with_shifted_shares(patch: pytest.MonkeyPatch) -> None:
    right = bucket.gather_shares

    def gather(buffer: torch.Tensor, axis: Any) -> Callable[[], None]:
        right(buffer, axis)()
        buffer.copy_(buffer.roll(len(buffer) // axis.size))
        return lambda: None

    patch.setattr(bucket, "gather_shares", gather)


def _nothing(buffer: torch.Tensor, axis: Any) -> Callable[[], None]:
    return lambda: None


def _without_others_shares(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bucket, "gather_shares", _nothing)


def _without_others_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bucket, "sum_shares", _nothing)


def _without_the_gradients_of_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bucket, "sum_copies", _nothing)


def _with_second_moments_of_own_shares(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WholeMatrices, "_sum", lambda *_: None)


def _with_swapped_rows(patch: pytest.MonkeyPatch) -> None:
    right = FullyShardedOptimizer.loaded

    def loaded(self: Any, step: int) -> None:
        for piece in self.update.pieces:
            piece.weight.copy_(piece.weight.flip(0))
        right(self, step)

    patch.setattr(FullyShardedOptimizer, "loaded", loaded)


def _without_the_last_reduction(patch: pytest.MonkeyPatch) -> None:
    right = FullyShardedOptimizer.backward

    def backward(self: Any, loss: torch.Tensor, last: bool) -> None:
        self.module.set_requires_gradient_sync(not last)
        right(self, loss, last)

    patch.setattr(FullyShardedOptimizer, "backward", backward)


def _without_weights_in_fp32(patch: pytest.MonkeyPatch) -> None:
    right = FullyShardedOptimizer.step

    def step(self: Any, learning_rate: float) -> torch.Tensor:
        norm = right(self, learning_rate)
        for piece in self.update.pieces:
            piece.weight.copy_(piece.weight.bfloat16())
        return norm

    patch.setattr(FullyShardedOptimizer, "step", step)


def _with_every_micro_batch_as_the_last(patch: pytest.MonkeyPatch) -> None:
    right = ShardedOptimizer.backward
    patch.setattr(ShardedOptimizer, "backward", lambda self, loss, last: right(self, loss, True))


def _with_decay_of_vectors(patch: pytest.MonkeyPatch) -> None:
    right = AdamW.adamw

    def decayed(self: AdamW, weights: Any) -> list[torch.optim.Optimizer]:
        return right(self, ((tensor, replace(weight, role="matrix")) for tensor, weight in weights))

    patch.setattr(AdamW, "adamw", decayed)


def _with_the_factor_of_a_tp_ranks_share(patch: pytest.MonkeyPatch) -> None:
    def of_share(self: WholeMatrices, function: Any, piece: Piece, share: torch.Tensor) -> torch.Tensor:
        return function(piece.placement.weight, share)

    patch.setattr(WholeMatrices, "_over_tp", of_share)


def _with_the_factor_of_a_ranks_rows(patch: pytest.MonkeyPatch) -> None:
    def of_rows(self: WholeMatrices, function: Any, cut: Any, axis: Any) -> dict[int, torch.Tensor]:
        wholes = ((piece, share, share.view(-1, *piece.placement.local[1:])) for piece, share in cut)
        return {id(piece): function(piece.placement.weight, rows).view_as(share) for piece, share, rows in wholes}

    patch.setattr(WholeMatrices, "_in_turn", of_rows)


def _without_the_last_keys_of_the_ring(patch: pytest.MonkeyPatch) -> None:
    right = ring.pairs
    patch.setattr(
        ring, "pairs", lambda batch, cp, tokens: {k: v for k, v in right(batch, cp, tokens).items() if k == cp.rank}
    )


def _without_the_exchange_of_heads(patch: pytest.MonkeyPatch) -> None:
    def alone(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        own = Batch.build(batch.tokens_T, batch.targets_T, [0, len(batch.tokens_T)])
        attended: torch.Tensor = self.core(q, k, v, own)
        return attended

    patch.setattr(ulysses.UlyssesAttention, "forward", alone)


def _with_overwritten_products(patch: pytest.MonkeyPatch) -> None:
    """Plants nothing: the layout, which `layout_problems` refuses, trains wrongly without an error from torch."""


def _with_a_norm_in_fp32(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(update, "squared_norm", lambda tensors, device: torch.nn.utils.get_total_norm(list(tensors)).square())


def _without_fp32_masters(patch: pytest.MonkeyPatch) -> None:
    right = ShardedOptimizer.step

    def step(self: Any, learning_rate: float) -> torch.Tensor:
        norm = right(self, learning_rate)
        for held in self.buckets:
            held.master.copy_(held.master.bfloat16())
        return norm

    patch.setattr(ShardedOptimizer, "step", step)


def _with_means_over_own_heads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor, "_mean_over_tp", lambda x, mesh: x.mean(-1, keepdim=True))


def _without_the_gradient_of_shared_means(patch: pytest.MonkeyPatch) -> None:
    def mean(x: torch.Tensor, mesh: Any) -> torch.Tensor:
        total = tensor.megatron.sum_over_tp(x.sum(-1, keepdim=True), mesh)
        return total / (x.shape[-1] * mesh.tp.size)

    patch.setattr(tensor, "_mean_over_tp", mean)


def _without_the_sum_of_gradients_inside_branches(patch: pytest.MonkeyPatch) -> None:
    right = tensor.apply_tensor_parallel

    def applied(model: Any, *args: Any) -> None:
        right(model, *args)
        for module in model.blocks.modules():
            if isinstance(module, WeightsModule):
                module.shared = unchanged

    patch.setattr(tensor, "apply_tensor_parallel", applied)


def _without_the_sum_of_gradients_of_whole_layers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor.SharedLinear, "forward", lambda self, x_TD: F.linear(x_TD, self.weight[self.rows]))


def _with_the_output_bias_on_each_rank(patch: pytest.MonkeyPatch) -> None:
    right = megatron.RowParallelLinear.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = right(self, x)
        return out if self.bias is None else out + (self.mesh.tp.size - 1) * self.bias

    patch.setattr(megatron.RowParallelLinear, "forward", forward)


def _with_slopes_of_the_first_heads(patch: pytest.MonkeyPatch) -> None:
    right = tensor.apply_tensor_parallel

    def applied(model: Any, mesh: Any, *args: Any) -> None:
        right(model, mesh, *args)
        for positions in model.kinds_of_positions:
            positions.heads = slice(0, positions.n_heads // mesh.tp.size)

    patch.setattr(tensor, "apply_tensor_parallel", applied)


def _with_positions_of_all_tokens(patch: pytest.MonkeyPatch) -> None:
    right = tensor.apply_tensor_parallel

    def applied(model: Any, mesh: Any, *args: Any) -> None:
        right(model, mesh, *args)
        model.embedded = lambda x_T: x_T.chunk(mesh.tp.size)[0]

    patch.setattr(tensor, "apply_tensor_parallel", applied)


def _with_sinks_of_the_first_heads(patch: pytest.MonkeyPatch) -> None:
    right: Any = ulysses.UlyssesAttention.forward

    def forward(self: Any, *args: Any) -> torch.Tensor:
        *tensors, sinks_H = args
        return right(self, *tensors, sinks_H.view(self.size, -1)[0].repeat(self.size))

    patch.setattr(ulysses.UlyssesAttention, "forward", forward)


def _without_the_copies_of_shards(patch: pytest.MonkeyPatch) -> None:
    def device_mesh(spread: Any, mesh: Any) -> Any:
        return DeviceMesh.from_group(spread.shards.group, mesh.device.type)

    patch.setattr(fully_sharded, "_device_mesh", device_mesh)


LATENT = "latent, whole queries, wide values"
OVER_ALL = "QK-norm over all heads"
BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any]]] = [
    (_without_sum_over_tp_of_gradients, {"tp": 2}),
    (_without_sum_over_tp_of_gradients, {"tp": 2, "sequence_parallel": True}),
    (_with_scores_for_padding, {"tp": 2}),
    (_with_layers_of_the_wrong_stage, {"pp": 2}),
    (_without_the_copied_gradients, {"pp": 2, "tied": True}),
    (_with_the_tied_copy_counted_twice, {"pp": 2, "dp": 2, "tied": True}),
    (
        _with_an_offloaded_tied_copy_counted_twice,
        {"pp": 2, "dp": 2, "tied": True, "offload_optimizer": True},
    ),
    (_with_batched_sends, {"pp": 2, "virtual_stages": 2}),
    (_with_the_mean_over_own_tokens, {"dp": 2, "zero": 0}),
    (_with_shifted_shares, {"dp": 2, "zero": 1}),
    (_without_others_shares, {"dp": 2, "zero": 2}),
    (_without_others_gradients, {"dp": 2, "zero": 1}),
    (_without_the_gradients_of_copies, {"dp": 2, "zero": 0}),
    (_without_the_gradients_of_copies, {"dp": 4, "dp_shard": 2, "zero": 2}),
    (_without_others_shares, {"dp": 4, "dp_shard": 2}),
    (_with_every_micro_batch_as_the_last, {"dp": 2, "zero": 2}),
    (_with_decay_of_vectors, {"dp": 2, "zero": 3}),
    (_with_the_factor_of_a_tp_ranks_share, {"tp": 2, "optimizer": "muon"}),
    (_with_the_factor_of_a_ranks_rows, {"dp": 2, "zero": 3, "optimizer": "muon"}),
    (_with_the_factor_of_a_tp_ranks_share, {"tp": 2, "dp": 2, "ep": 2, "optimizer": "muon", "options": (IN_GROUPS,)}),
    (_with_second_moments_of_own_shares, {"tp": 2, "optimizer": "normuon"}),
    (_with_second_moments_of_own_shares, {"dp": 2, "zero": 3, "optimizer": "normuon"}),
    (_with_swapped_rows, {"dp": 2, "zero": 3}),
    (_without_the_copies_of_shards, {"dp": 4, "dp_shard": 2, "zero": 3}),
    (_without_the_last_reduction, {"dp": 2, "zero": 3}),
    (_without_the_copied_gradients, {"pp": 2, "dp": 2, "zero": 3, "tied": True}),
    (_without_the_copied_gradients, {"pp": 2, "dp": 2, "zero": 3, "virtual_stages": 2, "options": ("T5 bias",)}),
    (_with_layers_of_the_wrong_stage, {"pp": 2, "dp": 2, "zero": 3}),
    (_without_the_last_keys_of_the_ring, {"cp": 2, "cp_method": "ring"}),
    (_without_the_exchange_of_heads, {"cp": 2}),
    (_with_overwritten_products, {"tp": 2, "recompute": "selective"}),
    (_with_a_norm_in_fp32, {"zero": 0, "large": True}),
    (_with_means_over_own_heads, {"tp": 2, "options": (OVER_ALL,)}),
    (_without_the_gradient_of_shared_means, {"tp": 2, "options": (OVER_ALL,)}),
    (_without_the_sum_of_gradients_inside_branches, {"tp": 2, "options": ("QK-norm",)}),
    (_without_the_sum_of_gradients_inside_branches, {"tp": 2, "sequence_parallel": True, "options": ("ScaleNorm",)}),
    (_without_the_sum_of_gradients_inside_branches, {"tp": 2, "options": (LATENT,)}),
    (_without_the_sum_of_gradients_of_whole_layers, {"tp": 2, "sequence_parallel": True, "options": (LATENT,)}),
    (_with_the_output_bias_on_each_rank, {"tp": 2, "options": ("sinks",)}),
    (_with_slopes_of_the_first_heads, {"tp": 2, "options": ("ALiBi",)}),
    (_with_positions_of_all_tokens, {"tp": 2, "sequence_parallel": True, "options": ("sinusoidal",)}),
    (_with_sinks_of_the_first_heads, {"cp": 2, "options": ("sinks",)}),
    (_without_the_copied_gradients, {"pp": 2, "options": ("T5 bias",)}),
    (_without_the_sum_of_gradients_inside_branches, {"tp": 2, "options": (ONE_SHARED,)}),
    (_without_fp32_masters, {"precision": "bf16"}),
    (_without_fp32_masters, {"dp": 2, "precision": "bf16"}),
    (_without_fp32_masters, {"dp": 2, "zero": 0, "precision": "bf16"}),
    (_without_weights_in_fp32, {"dp": 2, "zero": 3, "precision": "bf16"}),
    (_without_sum_over_tp_of_gradients, {"tp": 2, "precision": "bf16"}),
    (_with_the_mean_over_own_tokens, {"dp": 2, "precision": "bf16"}),
    (_with_decay_of_vectors, {"dp": 2, "zero": 3, "precision": "bf16"}),
    *planted_expert_bugs.BUGS,
    *planted_further_bugs.BUGS,
]
