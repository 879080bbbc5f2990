"""Tensor parallelism: a table of modules to swap in the plain model (Shoeybi et al. 2019).

A block needs one all-reduce in forward after each of wo and w_down, and one in backward before each
norm's consumers. Parameter names do not change.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from triplane.model.batch import IGNORED_TARGET
from triplane.model.head import Head
from triplane.model.transformer import Transformer
from triplane.parallel import megatron
from triplane.parallel.mesh import Mesh


def apply_tensor_parallel(model: Transformer, mesh: Mesh) -> None:
    """Replaces the modules of `model` (on meta) by those that hold this rank's share."""
    swaps: dict[str, Callable[..., nn.Module]] = {
        "embedding": megatron.VocabParallelEmbedding,
        "attention_norm": CopyingRMSNorm,
        "wq": megatron.ColumnParallelLinear,
        "wk": megatron.ColumnParallelLinear,
        "wv": megatron.ColumnParallelLinear,
        "wo": megatron.RowParallelLinear,
        "feed_forward_norm": CopyingRMSNorm,
        "w_gate": megatron.ColumnParallelLinear,
        "w_up": megatron.ColumnParallelLinear,
        "w_down": megatron.RowParallelLinear,
        "norm": CopyingRMSNorm,
        "head": VocabParallelHead,
    }
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in swaps:
                setattr(parent, name, swaps[name](child, mesh))


class CopyingRMSNorm(nn.RMSNorm):
    """RMSNorm whose output goes to column-parallel layers: its gradient is summed over tp."""

    def __init__(self, norm: nn.RMSNorm, mesh: Mesh):
        super().__init__(norm.normalized_shape, eps=norm.eps, dtype=norm.weight.dtype)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        return megatron.copy_to_tp(super().forward(x), self.mesh)


class VocabParallelHead(Head):
    """A head that holds a share of the vocabulary's rows; its loss is that of the whole."""

    def __init__(self, head: Head, mesh: Mesh):
        nn.Module.__init__(self)
        vocab_size, dim = head.weight.shape
        self.weight = nn.Parameter(head.weight.new_empty(vocab_size // mesh.tp.size, dim))
        self.z_loss_weight = head.z_loss_weight
        self.mesh = mesh

    def losses(self, logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        counted_T = targets_T != IGNORED_TARGET
        targets_T = torch.where(counted_T, targets_T, 0)
        # A copy, since the cross-entropy overwrites its logits; the target's logit is taken first.
        logits_TV = logits_TV.to(torch.float32, copy=True)
        target_logit_T = self._target_logit(logits_TV, targets_T) if self.z_loss_weight else None
        loss_T = megatron.vocab_parallel_cross_entropy(logits_TV, targets_T) * counted_T
        if target_logit_T is None:
            return loss_T.sum(), loss_T.new_zeros(())
        # The loss is the log-partition less the target's logit.
        partition_T = (loss_T + target_logit_T) * counted_T
        return loss_T.sum(), self.z_loss_weight * partition_T.square().sum()

    def _target_logit(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        share = logits_TV.shape[1]
        local_T = targets_T - self.mesh.tp.rank * share
        here_T = (local_T >= 0) & (local_T < share)
        tokens_T = torch.arange(len(local_T), device=local_T.device)
        picked_T = logits_TV[tokens_T, local_T.clamp(0, share - 1)]  # a copy; gather would keep the logits
        return megatron.sum_over_tp(picked_T * here_T, self.mesh)
