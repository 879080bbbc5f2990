"""Cross-entropy and z-loss, summed over tokens: the caller divides by the tokens of the global batch."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from triplane.model.batch import IGNORED_TARGET


class Loss(NamedTuple):
    """Sums over the positions that have a target; nats."""

    cross_entropy: Tensor
    z: Tensor
    """Sum of the squared log-partition times its weight; zero where the weight is."""


class CrossEntropy(nn.Module):
    """Cross-entropy of (T, V) logits against T targets, computed in fp32."""

    def __init__(self, z_loss_weight: float):
        super().__init__()
        self.z_loss_weight = z_loss_weight

    def forward(self, logits_TV: Tensor, targets_T: Tensor) -> Loss:
        logits_TV = logits_TV.float()
        cross_entropy = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED_TARGET, reduction="sum")
        if not self.z_loss_weight:
            return Loss(cross_entropy, cross_entropy.new_zeros(()))
        partition_T = logits_TV.logsumexp(dim=-1) * (targets_T != IGNORED_TARGET)
        return Loss(cross_entropy, self.z_loss_weight * partition_T.square().sum())
