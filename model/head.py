"""The output head and its loss, in chunks of tokens, so that (T, V) logits never exist in memory.

Forward computes a chunk's gradients while it has the logits (as Liger Kernel does, Hsu et al. 2024): nothing is
computed twice, and only the gradients of x and of the weight are kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from triplane.model.batch import IGNORED_TARGET
from triplane.model.config import CHUNK_LOGITS, ModelConfig


class Loss(NamedTuple):
    """Sums over the positions that have a target; nats. The caller divides by the tokens of the global batch."""

    objective: Tensor
    """The training objective, the sum of the others; the only one with a gradient."""
    cross_entropy: Tensor
    z: Tensor
    """Sum of the squared log-partition times its weight."""
    further: Tensor
    """Cross-entropy of further predictions times its weight; 0 without."""


Differentiated = tuple[Tensor, Tensor, Tensor | None]
"""Cross-entropy, z-loss, and the gradient of their sum with respect to the logits."""


class Head(nn.Module):
    """A projection to the vocabulary and the cross-entropy of its logits, computed in fp32."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.bias = nn.Parameter(torch.empty(config.vocab_size)) if config.head_bias else None
        self.scale = config.head_scale
        self.softcap = config.head_softcap
        self.z_loss_weight = config.z_loss_weight

    def forward(self, x_TD: Tensor, targets_T: Tensor | None = None) -> Loss | Tensor:
        """Returns the loss, or the logits (T, V) without targets."""
        if targets_T is None:
            return self.shaped(F.linear(x_TD, self.weight, self.bias))
        chunk = max(1, CHUNK_LOGITS[x_TD.device.type] // len(self.weight))
        objective, cross_entropy, z = _Chunked.apply(  # type: ignore[no-untyped-call]
            x_TD, self.weight, self.bias, targets_T, chunk, self.differentiated
        )
        return Loss(objective, cross_entropy, z, further=torch.zeros_like(z))

    def differentiated(self, logits_TV: Tensor, targets_T: Tensor, train: bool) -> Differentiated:
        """Returns the sums of cross-entropy and z-loss over tokens, and if `train` the gradient of the logits."""
        logits_TV.requires_grad_(train)
        with torch.set_grad_enabled(train):
            cross_entropy, z = self.losses(self.shaped(logits_TV), targets_T)
            gradient = torch.autograd.grad(cross_entropy + z, logits_TV)[0] if train else None
        return cross_entropy.detach(), z.detach(), gradient

    def compile_loss(self) -> None:
        """Compiles the loss, unless the logits are scaled or capped first."""
        if self.scale == 1 and self.softcap is None:
            self.differentiated = torch.compile(partial(_differentiated, self.z_loss_weight))  # type: ignore[method-assign]

    def shaped(self, logits_TV: Tensor) -> Tensor:
        """Returns the logits scaled and capped; the cap in fp32."""
        if self.scale != 1:
            logits_TV = logits_TV * self.scale
        if self.softcap is None:
            return logits_TV
        return (self.softcap * (logits_TV.float() / self.softcap).tanh()).to(logits_TV.dtype)

    def losses(self, logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sums of cross-entropy and z-loss over tokens; overwrites fp32 logits."""
        cross_entropy, z = _CrossEntropy.apply(logits_TV.float(), targets_T, self.z_loss_weight)  # type: ignore[no-untyped-call]
        return cross_entropy, z


def _differentiated(z_loss_weight: float, logits_TV: Tensor, targets_T: Tensor, train: bool) -> Differentiated:
    """Computes what `_CrossEntropy` does as the compiler likes it: in three passes over a row that is in the cache."""
    counted_T, wide_TV = targets_T != IGNORED_TARGET, logits_TV.float()
    partition_T = wide_TV.logsumexp(-1)
    hit_TV = torch.arange(logits_TV.shape[1], dtype=torch.int32, device=targets_T.device) == targets_T.int()[:, None]
    cross_entropy_T = (partition_T - wide_TV.where(hit_TV, 0).sum(-1)) * counted_T
    z_T = z_loss_weight * partition_T.square() * counted_T
    if not train:
        return cross_entropy_T.sum(), z_T.sum(), None
    slope_T = (1 + 2 * z_loss_weight * partition_T) * counted_T
    gradient_TV = (wide_TV - partition_T[:, None]).exp() * slope_T[:, None] - hit_TV.float()
    return cross_entropy_T.sum(), z_T.sum(), gradient_TV.to(logits_TV.dtype)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        chunk: int,
        differentiated: Callable[[Tensor, Tensor, bool], Differentiated],
    ) -> tuple[Tensor, ...]:
        train = ctx.needs_input_grad[0]
        sums = torch.zeros(2, device=x_TD.device)
        grad_x_TD = torch.empty_like(x_TD) if train else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if train else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if train and bias_V is not None else None
        for start in range(0, len(x_TD), chunk):
            part = slice(start, start + chunk)
            x = x_TD[part].detach()
            logits = F.linear(x, weight_VD.detach(), None if bias_V is None else bias_V.detach())
            cross_entropy, z, grad_logits = differentiated(logits, targets_T[part], train)
            sums += torch.stack((cross_entropy, z))
            if grad_logits is not None and grad_x_TD is not None and grad_weight_VD is not None:
                grad_x_TD[part] = grad_logits @ weight_VD
                if grad_bias_V is not None:
                    grad_bias_V += grad_logits.sum(dim=0, dtype=torch.float32)
                if x.dtype == torch.float32:
                    grad_weight_VD.addmm_(grad_logits.T, x)  # saves a pass over (V, D)
                else:
                    grad_weight_VD += grad_logits.T @ x
        if grad_weight_VD is not None:
            grad_bias_V = None if grad_bias_V is None else grad_bias_V.to(weight_VD.dtype)
            ctx.save_for_backward(grad_x_TD, grad_weight_VD.to(weight_VD.dtype), grad_bias_V)
        cross_entropy, z = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, z)
        return cross_entropy + z, cross_entropy, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_TD, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        grad_bias_V = None if grad_bias_V is None else grad_bias_V * grad
        return grad_x_TD * grad, grad_weight_VD * grad, grad_bias_V, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """Computes in the memory of the logits, which becomes their gradient, with one exponential per logit."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, z_loss_weight: float) -> tuple[Tensor, Tensor]:
        counted_T1 = (targets_T != IGNORED_TARGET)[:, None]
        targets_T1 = targets_T[:, None].where(counted_T1, 0)
        top_T1 = logits_TV.amax(dim=-1, keepdim=True)
        target_logit_T1 = logits_TV.gather(1, targets_T1) * counted_T1
        exp_TV = logits_TV.sub_(top_T1).exp_()
        sum_T1 = exp_TV.sum(dim=-1, keepdim=True)
        partition_T1 = (top_T1 + sum_T1.log()) * counted_T1
        ctx.z_loss_weight = z_loss_weight
        ctx.save_for_backward(exp_TV, sum_T1, partition_T1, targets_T1, counted_T1)
        return (partition_T1 - target_logit_T1).sum(), z_loss_weight * partition_T1.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        exp_TV, sum_T1, partition_T1, targets_T1, counted_T1 = ctx.saved_tensors
        grad_T1 = grad * counted_T1
        grad_partition_T1 = grad_T1 + 2 * ctx.z_loss_weight * grad_z * partition_T1
        grad_logits_TV = exp_TV.mul_(grad_partition_T1 / sum_T1)
        return grad_logits_TV.scatter_add_(1, targets_T1, -grad_T1), None, None
