"""Brings matrices together whose shares lie on several tp ranks, for updates that need a whole one."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from triplane.model.weights import Weight
from triplane.parallel.mesh import Mesh
from triplane.parallel.update import Piece


class WholeMatrices:
    """The matrices that `pieces` are shares of; the tp ranks hold pieces of the same ones, in the same order."""

    def __init__(self, pieces: Sequence[Piece], mesh: Mesh):
        for piece in pieces:
            assert piece.weight.shape == piece.placement.local, f"{piece.placement.name} is cut within dp x cp"
        self.pieces = pieces
        self.tp = mesh.tp

    def map(self, function: Callable[[Weight, Tensor], Tensor], shares: Sequence[Tensor]) -> list[Tensor]:
        """Returns this rank's shares of `function`'s results for whole matrices, given its shares of these. Collective.

        Each tp rank computes it, since it needs its share of the result anyway.
        """
        results = []
        for piece, share in zip(self.pieces, shares, strict=True):
            placement = piece.placement
            if not placement.sharded:
                results.append(function(placement.weight, share))
                continue
            parts = [torch.empty_like(share) for _ in range(self.tp.size)]
            dist.all_gather(parts, share.contiguous(), group=self.tp.group)
            (dim,) = (i for i, (mine, all_) in enumerate(zip(placement.local, placement.shape)) if mine != all_)
            whole = function(placement.weight, torch.cat(parts, dim))
            results.append(whole.narrow(dim, placement.offsets[dim], placement.local[dim]))
        return results
