"""ZeRO stages 0 to 2 (Rajbhandari et al. 2020) over dp x cp, updated on the device or on the host.

Stage 0 is that of shards over one rank: all others hold copies.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from triplane.parallel.bucket import Bucket
from triplane.parallel.mesh import Mesh, Spread
from triplane.parallel.packing import bucket_runs
from triplane.parallel.placement import Fragment, LocalModel, Placement
from triplane.parallel.update import OptimizerKind, Update


class ShardedOptimizer:
    """Averages gradients over dp x cp in buckets, clips by the global norm, updates a share, and gathers all of them.

    Weights in bf16 have a master in fp32; their gradients add up and are reduced in fp32.
    """

    def __init__(self, local: LocalModel, kind: OptimizerKind, mesh: Mesh, *, partition_gradients: bool, offload: bool):
        """With `partition_gradients` a rank keeps only its share of them between micro-batches: stage 2.

        With `offload` fp32 weights and moments are on the host.
        """
        self.module = local.module
        self.mesh = mesh
        self.partitions = partition_gradients
        self.buckets = list(_buckets(local.placements, kind, offload))
        self._bucket: dict[Tensor, Bucket] = {p.parameter: bucket for bucket in self.buckets for p in bucket.placements}
        for parameter in self._bucket:
            parameter.register_post_accumulate_grad_hook(self._collect)  # type: ignore[no-untyped-call]
        self.update = Update(kind, [piece for bucket in self.buckets for piece in bucket.pieces], mesh)
        self._reducing = False
        self._last = True
        self._started = 0
        """Buckets whose reduction has started, all in one order on all ranks."""
        self._kept = 0
        """Those of them of which only the share is kept."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradients of `loss`; reduces each bucket once it is complete, in the `last` micro-batch
        or, where gradients are partitioned, in each.
        """
        self._reducing, self._last = last or self.partitions, last
        for bucket in self.buckets:
            bucket.awaited = len(bucket.placements)
        loss.backward()  # type: ignore[no-untyped-call]
        self._reducing = False
        if not last and self.partitions:
            self._reduce_all()
            self._started = self._kept = 0

    def accumulation(self) -> AbstractContextManager[None]:
        """Wraps a schedule's backward passes, whose gradients are reduced in `step`: some must be summed first."""
        return nullcontext()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns the gradient accumulated on this rank."""
        return self._bucket[parameter].gradient(parameter)

    def _collect(self, parameter: Tensor) -> None:
        self._bucket[parameter].collect(parameter)
        while self._reducing and self._started < len(self.buckets) and not self.buckets[self._started].awaited:
            self._reduce_next()

    def _reduce_next(self) -> None:
        # While one bucket is on its way, the next is filled.
        self._keep_shares()
        self.buckets[self._started].reduce()
        self._started += 1

    def _keep_shares(self) -> None:
        for bucket in self.buckets[self._kept : self._started]:
            bucket.keep_share(free=self.partitions)
            if self._last:
                bucket.reduce_copies()
        self._kept = self._started

    def _reduce_all(self) -> None:
        while self._started < len(self.buckets):
            self._reduce_next()
        self._keep_shares()

    def step(self, learning_rate: float) -> Tensor:
        """Applies and clears the gradients; returns their global norm before clipping.

        Applies nothing if the norm is not finite.
        """
        with self._averaged():
            norm = self.update.apply(learning_rate)
        self._publish()
        return norm

    def discard(self) -> Tensor:
        """Clears the gradients; returns their global norm."""
        with self._averaged():
            return self.update.discard()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within, the pieces have their gradients, averaged over dp x cp."""
        self._reduce_all()
        self._started = self._kept = 0
        for bucket in self.buckets:
            # Of dp x cp whatever the bucket's own ranks are: each holds a part of the sum over all tokens.
            bucket.finish(self.mesh.replicas.size)
        yield
        for bucket in self.buckets:
            bucket.clear()

    def _publish(self) -> None:
        for wait in [bucket.publish() for bucket in self.buckets]:
            wait()

    def fragments(self) -> Iterator[Fragment]:
        """Yields the state on this rank."""
        return self.update.fragments()

    def loaded(self, step: int) -> None:
        """Adopts fragments that were filled with the state after `step` updates."""
        self.update.loaded(step)
        self._publish()


def _buckets(placements: list[Placement], kind: OptimizerKind, offload: bool) -> Iterator[Bucket]:
    """Puts together parameters that share ranks and a dtype, in the order in which backward reaches them."""
    groups: dict[tuple[Spread, torch.dtype, bool], list[Placement]] = defaultdict(list)
    for placement in reversed(placements):
        groups[placement.spread, placement.parameter.dtype, kind.whole(placement.weight)].append(placement)
    for (spread, _, whole), group in groups.items():
        sizes = [placement.local.numel() for placement in group]
        for run in bucket_runs(sizes, spread.shards.size, whole=whole):
            yield Bucket(group[run.start : run.stop], whole=whole, offload=offload)
