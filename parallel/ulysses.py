"""Ulysses attention (Jacobs et al. 2023): all-to-all from a share of the tokens to a share of the heads, and back."""

from math import gcd

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from triplane.model.batch import Batch
from triplane.parallel.mesh import Axis


class UlyssesAttention(nn.Module):
    """Runs `core` on all tokens of the stream and 1 / cp of the query heads, which cp must divide.

    Where cp does not divide the key/value heads, each goes to every rank that needs it.
    """

    def __init__(self, core: nn.Module, cp: Axis):
        super().__init__()
        assert cp.group is not None, "Ulysses needs two ranks"
        self.core = core
        self.size, self.rank = cp.size, cp.rank
        self.group = cp.group

    def forward(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        batch: Batch,
        bias_HL: Tensor | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        tokens, n_heads, head_dim = q_THK.shape
        assert n_heads % self.size == 0, f"cp ({self.size}) must divide the query heads ({n_heads})"
        copies = self.size // gcd(self.size, k_TGK.shape[1])
        if copies > 1:
            k_TGK, v_TGK = (x.repeat_interleave(copies, dim=1) for x in (k_TGK, v_TGK))
        # One message per rank: its heads of q, k and v side by side.
        by_rank = [x.reshape(tokens, self.size, -1, head_dim).transpose(0, 1) for x in (q_THK, k_TGK, v_TGK)]
        qkv = self._exchange(torch.cat(by_rank, dim=2)).flatten(0, 1)
        share = n_heads // self.size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        extras = (None if x is None else x[mine] for x in (bias_HL, sinks_H))
        out_THK = self.core(*torch.split(qkv, [x.shape[2] for x in by_rank], dim=1), batch, *extras)
        return self._exchange(out_THK.view(self.size, tokens, -1, head_dim)).transpose(0, 1).flatten(1, 2)

    def _exchange(self, x: Tensor) -> Tensor:
        """Sends x[i] to rank i; returns what each rank sent, by rank."""
        return collectives.all_to_all_single(x.contiguous(), None, None, self.group)
