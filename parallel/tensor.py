"""Tensor parallelism: swaps modules of the plain model by a table (Shoeybi et al. 2019).

A block needs one all-reduce in forward after each of wo and w_down, and one in backward before each norm's
consumers. With sequence parallelism (Korthikanti et al. 2022) the norms and the residual stream hold a share of
the tokens: each all-reduce becomes a reduce-scatter and an all-gather. Parameter names do not change.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triplane.model.batch import IGNORED_TARGET
from triplane.model.config import ModelConfig
from triplane.model.head import Head
from triplane.model.transformer import Transformer
from triplane.parallel import megatron
from triplane.parallel.mesh import Mesh
from triplane.parallel.rules import vocabulary_rows


def apply_tensor_parallel(model: Transformer, mesh: Mesh, sequence_parallel: bool) -> None:
    """Replaces the modules of `model` (on meta) by modules that hold this rank's share."""
    config, tp = model.config, mesh.tp.size
    rows = vocabulary_rows(config.vocab_size, tp)

    def column(linear: nn.Linear) -> nn.Module:
        return megatron.ColumnParallelLinear(linear, mesh)

    def row(linear: nn.Linear) -> nn.Module:
        return megatron.RowParallelLinear(linear, mesh, sequence_parallel)

    def key_value(linear: nn.Linear) -> nn.Module:
        return column(linear) if config.n_kv_heads % tp == 0 else SharedKeyValueLinear(linear, config, mesh)

    def norm(norm: nn.RMSNorm) -> nn.Module:
        return GatheringRMSNorm(norm, mesh) if sequence_parallel else CopyingRMSNorm(norm, mesh)

    swaps: dict[str, Callable[..., nn.Module]] = {
        "embedding": lambda table: megatron.VocabParallelEmbedding(
            table, rows, mesh, sequence_parallel=sequence_parallel
        ),
        "attention_norm": norm,
        "wq": column,
        "wk": key_value,
        "wv": key_value,
        "wo": row,
        "feed_forward_norm": norm,
        "w_gate": column,
        "w_up": column,
        "w_down": row,
        "norm": norm,
        "head": lambda head: VocabParallelHead(head, rows, mesh),
    }
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in swaps:
                setattr(parent, name, swaps[name](child))


class CopyingRMSNorm(nn.RMSNorm):
    """RMSNorm whose output feeds column-parallel layers; sums the output's gradient over tp."""

    def __init__(self, norm: nn.RMSNorm, mesh: Mesh):
        super().__init__(norm.normalized_shape, eps=norm.eps, dtype=norm.weight.dtype)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        return megatron.copy_to_tp(super().forward(x), self.mesh)


class GatheringRMSNorm(CopyingRMSNorm):
    """RMSNorm of this rank's tokens, (T / tp, D); gathers its output to (T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = megatron.copy_to_tp(self.weight, self.mesh)  # each rank sees the gradient of its tokens
        normed = F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return megatron.gather_tokens(normed, self.mesh)


class SharedKeyValueLinear(nn.Module):
    """A key or value projection with fewer heads than tp ranks: held whole, used for the one head that a rank needs."""

    def __init__(self, linear: nn.Linear, config: ModelConfig, mesh: Mesh):
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(linear.weight))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty_like(linear.bias))
        self.mesh = mesh
        start = mesh.tp.rank * config.n_kv_heads // mesh.tp.size * config.head_dim
        self.head = slice(start, start + config.head_dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        # Each rank sees a part of its head's gradient, and none of the other heads'.
        weight = megatron.copy_to_tp(self.weight, self.mesh)[self.head]
        bias = None if self.bias is None else megatron.copy_to_tp(self.bias, self.mesh)[self.head]
        return F.linear(x_TD, weight, bias)


class VocabParallelHead(Head):
    """A head that holds `rows` rows of the vocabulary; its loss is over the whole vocabulary.

    Rows past the vocabulary are zero, score minus infinity, and have no gradient.
    """

    tp_dim = 0

    def __init__(self, head: Head, rows: int, mesh: Mesh):
        nn.Module.__init__(self)
        vocab_size, dim = head.weight.shape
        self.weight = nn.Parameter(head.weight.new_empty(rows, dim))
        self.z_loss_weight = head.z_loss_weight
        self.mesh = mesh
        self.used = min(rows, max(0, vocab_size - mesh.tp.rank * rows))

    def losses(self, logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        counted_T = targets_T != IGNORED_TARGET
        targets_T = torch.where(counted_T, targets_T, 0)
        # A copy, since the cross-entropy overwrites its logits; the target's logit is read first.
        logits_TV = logits_TV.to(torch.float32, copy=True)
        if self.used < logits_TV.shape[1]:
            logits_TV[:, self.used :] = float("-inf")
        target_logit_T = self._target_logit(logits_TV, targets_T) if self.z_loss_weight else None
        loss_T = megatron.vocab_parallel_cross_entropy(logits_TV, targets_T) * counted_T
        if target_logit_T is None:
            return loss_T.sum(), loss_T.new_zeros(())
        # The loss is the log-partition minus the target's logit.
        partition_T = (loss_T + target_logit_T) * counted_T
        return loss_T.sum(), self.z_loss_weight * partition_T.square().sum()

    def _target_logit(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        share = logits_TV.shape[1]
        local_T = targets_T - self.mesh.tp.rank * share
        here_T = (local_T >= 0) & (local_T < share)
        tokens_T = torch.arange(len(local_T), device=local_T.device)
        picked_T = logits_TV[tokens_T, local_T.clamp(0, share - 1)]  # a copy; gather would keep the logits
        return megatron.sum_over_tp(torch.where(here_T, picked_T, 0), self.mesh)
