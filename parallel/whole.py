"""Brings matrices together whose shares lie on several ranks, for updates that need a whole one."""

from collections.abc import Callable, Sequence
from itertools import compress, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from triplane.model.weights import Weight
from triplane.parallel.axes import split_dim
from triplane.parallel.mesh import Axis, Mesh
from triplane.parallel.update import Piece

Function = Callable[[Weight, Tensor], Tensor]
"""Maps a whole matrix to one of its shape."""


class WholeMatrices:
    """The matrices that `pieces` are shares of; all ranks that share them hold theirs in the same order."""

    def __init__(self, pieces: Sequence[Piece], mesh: Mesh):
        self.pieces = pieces
        self.tp = mesh.tp

    def map(self, function: Function, shares: Sequence[Tensor]) -> list[Tensor]:
        """Returns this rank's shares of `function`'s results for whole matrices, given its shares of these. Collective.

        Where ZeRO 3 cuts matrices, its ranks take turns in computing one. Each tp rank computes all of its own, since
        it needs its share of the result anyway.
        """
        given = list(zip(self.pieces, shares, strict=True))
        results: dict[int, Tensor] = {}
        for piece, share in given:
            if piece.cut is None:
                results[id(piece)] = self._over_tp(function, piece, share)
        for axis in self._cuts:
            cut = [(piece, share) for piece, share in given if piece.cut == axis]
            for first in range(0, len(cut), axis.size):
                results |= self._in_turn(function, cut[first : first + axis.size], axis)
        return [results[id(piece)] for piece in self.pieces]

    def sum_over_columns(self, of_rows: Sequence[Tensor]) -> None:
        """Sums a value of each row, in place, over the ranks that split its columns. Collective."""
        self._sum(of_rows, self.tp, [self._split(piece) == 1 for piece in self.pieces])

    def sum_over_rows(self, of_matrices: Sequence[Tensor]) -> None:
        """Sums values of each matrix, in place, over the ranks that split its rows. Collective.

        ZeRO 3 gives its ranks rows of a matrix, but of several matrices whole ones.
        """
        self._sum(of_matrices, self.tp, [self._split(piece) == 2 for piece in self.pieces])
        for axis in self._cuts:
            self._sum(of_matrices, axis, [piece.cut == axis and len(piece.shape) == 2 for piece in self.pieces])

    @property
    def _cuts(self) -> list[Axis]:
        """The axes among whose ranks rows are spread."""
        return list(dict.fromkeys(piece.cut for piece in self.pieces if piece.cut is not None))

    def _split(self, piece: Piece) -> int | None:
        """Returns the dim that tp splits, from the last: 1 for columns, 2 for rows."""
        weight = piece.placement.weight
        dim = split_dim(weight, self.tp.size)
        return None if dim is None else len(weight.axes) - dim

    @staticmethod
    def _sum(values: Sequence[Tensor], axis: Axis, chosen: Sequence[bool]) -> None:
        """Sums the chosen ones over the ranks of an axis, in one message."""
        mine = list(compress(values, chosen))
        if not mine or axis.size == 1:
            return
        flat = torch.cat([value.flatten() for value in mine])
        dist.all_reduce(flat, group=axis.group)
        for value, total in zip(mine, torch.split(flat, [value.numel() for value in mine])):
            value.copy_(total.view_as(value))

    def _over_tp(self, function: Function, piece: Piece, share: Tensor) -> Tensor:
        """Returns this tp rank's share of the result."""
        placement = piece.placement
        assert share.shape == placement.local, f"{placement.name} is cut within dp x cp"
        dim = split_dim(placement.weight, self.tp.size)
        if dim is None:
            return function(placement.weight, share)
        parts = [torch.empty_like(share) for _ in range(self.tp.size)]
        dist.all_gather(parts, share.contiguous(), group=self.tp.group)
        whole = function(placement.weight, torch.cat(parts, dim))
        return whole.narrow(dim, placement.offsets[dim], placement.local[dim])

    def _in_turn(self, function: Function, cut: Sequence[tuple[Piece, Tensor]], axis: Axis) -> dict[int, Tensor]:
        """Returns the shares of at most `axis.size` matrices, by piece: rank i of the axis computes matrix i."""
        mine = [share.numel() for _, share in cut] + [0] * (axis.size - len(cut))
        own = cut[axis.rank][0] if axis.rank < len(cut) else None
        cuts = [0] * (axis.size + 1) if own is None else own.placement.cuts(axis.size)
        theirs = [stop - start for start, stop in pairwise(cuts)]
        sent = torch.cat([share.flatten() for _, share in cut])
        received = sent.new_empty(sum(theirs))
        dist.all_to_all_single(received, sent, theirs, mine, group=axis.group)
        if own is not None:
            whole = self._over_tp(function, own, received.view(own.placement.local))
            received = whole.contiguous().flatten()
        back = torch.empty_like(sent)
        dist.all_to_all_single(back, received, mine, theirs, group=axis.group)
        parts = torch.split(back, mine[: len(cut)])
        return {id(piece): part.view_as(share) for (piece, share), part in zip(cut, parts)}
