"""Parameters whose gradients are reduced at once: one buffer of weights and one of gradients, in equal shares."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from triplane.parallel.exchange import Wait, gather_shares, own_share, sum_copies, sum_shares
from triplane.parallel.packing import pack
from triplane.parallel.placement import Placement
from triplane.parallel.update import Piece


class Bucket:
    """Holds the parameters' weights, and while there are any their gradients, fp32."""

    def __init__(self, placements: Sequence[Placement], *, whole: bool, offload: bool):
        """`whole` keeps each parameter within one share. The parameters, zeros until now, become views.

        With `offload` the fp32 share is on the host, which updates it.
        """
        self.placements = placements
        self.spread = placements[0].spread
        shards = self.spread.shards
        sizes = [placement.local.numel() for placement in placements]
        starts, self._share = pack(sizes, shards.size, whole=whole)
        self._starts: dict[Tensor, int] = {p.parameter: start for p, start in zip(placements, starts)}
        self._weights = placements[0].parameter.detach().new_zeros(shards.size * self._share)
        for parameter in self._starts:
            parameter.data = self._run(self._weights, parameter)
        self._own = own_share(self._weights, shards)
        self.master = _on_host(self._own.float()) if offload else self._own.float()
        """fp32, this rank's share; what is rounded to the weights."""
        self._cut = list(self._pieces())
        self.awaited = 0
        """Gradients still to come in a backward pass."""
        self._gradients: Tensor | None = None
        """Summed over the micro-batches that are not reduced yet."""
        self._empty: set[Tensor] = set()
        """Parameters of which `_gradients` holds nothing yet."""
        self._summed: Tensor | None = None
        """This rank's share, summed over ranks."""
        self._wait: Wait | None = None

    @property
    def pieces(self) -> Iterator[Piece]:
        """The parts of the parameters that this rank updates."""
        return (piece for piece, _ in self._cut)

    def _pieces(self) -> Iterator[tuple[Piece, slice]]:
        """Yields each piece and its place in the share."""
        first = self.spread.shards.rank * self._share
        for number, placement in enumerate(self.placements):
            start = self._starts[placement.parameter]
            begin, end = max(start, first), min(start + placement.local.numel(), first + self._share)
            if begin < end:
                place = slice(begin - first, end - first)
                weight = self.master[place]
                piece = Piece(
                    placement,
                    weight.view(placement.local) if len(weight) == placement.local.numel() else weight,
                    start=begin - start,
                    copies=self.spread.copies.size,
                    # The copies take turns in writing parameters.
                    writes=number % self.spread.copies.size == self.spread.copies.rank,
                )
                yield piece, place

    def _run(self, buffer: Tensor, parameter: Tensor) -> Tensor:
        return buffer[self._starts[parameter] :][: parameter.numel()].view_as(parameter)

    def collect(self, parameter: Tensor) -> None:
        """Takes over the parameter's gradient from autograd.

        That costs no more than letting autograd add to the buffer, which would have to be cleared first.
        """
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        run = self._run(self._buffer(), parameter)
        if parameter in self._empty:
            self._empty.remove(parameter)
            run.copy_(gradient)
        else:
            run.add_(gradient)
        self.awaited -= 1

    def gradient(self, parameter: Tensor) -> Tensor:
        """Returns the parameter's gradient on this rank before it is reduced; zeros if it took no part."""
        run = self._run(self._buffer(), parameter)
        if parameter in self._empty:
            self._empty.remove(parameter)
            run.zero_()
        return run

    def _buffer(self) -> Tensor:
        if self._gradients is None:
            self._gradients = torch.empty_like(self._weights, dtype=torch.float32)
            self._empty = set(self._starts)
        return self._gradients

    def reduce(self) -> None:
        """Starts to sum the gradients over the shards."""
        assert self._gradients is not None and not self._empty, "every parameter takes part in every step"
        self._wait = sum_shares(self._gradients, self.spread.shards)

    def keep_share(self, *, free: bool) -> None:
        """Waits for `reduce` and adds this rank's share to those of earlier micro-batches; `free`s the others."""
        assert self._gradients is not None and self._wait is not None
        self._wait()
        self._wait = None  # it holds what others sent
        share = own_share(self._gradients, self.spread.shards)
        if self._summed is not None:
            self._summed += share
        else:
            self._summed = share.clone() if free else share
        if free:
            self._gradients = None

    def reduce_copies(self) -> None:
        """Starts to sum the share over the copies."""
        assert self._summed is not None
        self._wait = sum_copies(self._summed, self.spread.copies)

    def finish(self, replicas: int) -> None:
        """Waits for `reduce_copies` and gives the pieces their gradients, averaged over `replicas` ranks."""
        assert self._summed is not None and self._wait is not None
        self._wait()
        if replicas > 1:
            self._summed /= replicas
        summed = self._summed.to(self.master.device)
        for piece, place in self._cut:
            piece.weight.grad = summed[place].view_as(piece.weight)

    def clear(self) -> None:
        """Frees the gradients."""
        self._gradients = self._summed = self._wait = None

    def publish(self) -> Wait:
        """Rounds the master to the weights and starts to gather those of all ranks."""
        if self.master is not self._own:
            self._own.copy_(self.master, non_blocking=True)  # the host's next update waits for gradients first
        return gather_shares(self._weights, self.spread.shards)


def _on_host(share: Tensor) -> Tensor:
    """Returns it in memory of the host, from which a GPU copies on its own."""
    return share.cpu().pin_memory() if share.is_cuda else share
