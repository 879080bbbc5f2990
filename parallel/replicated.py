"""Every dp x cp rank holds the whole optimizer: ZeRO stage 0, or a rank that has nobody to share with. Plain torch.

DeepSpeed's own stage 0 clips wrongly under a pipeline and reports no gradient norm; its stages 1 and 2 copy gradients
and weights for others even where there are none.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment, LocalModel
from triplane.parallel.update import OptimizerKind, Piece, Update

_BUCKET_ELEMENTS = 32 * 1024**2
"""Gradients reduced at once: few collectives, bounded extra memory."""


class ReplicatedOptimizer:
    """Averages gradients over dp x cp, clips by the global norm, and updates.

    Weights in bf16 have a master in fp32, which is updated and rounded to them; their gradients add up in fp32.
    """

    def __init__(self, local: LocalModel, kind: OptimizerKind, mesh: Mesh):
        self.module = local.module
        self.mesh = mesh
        self.parameters = [placement.parameter for placement in local.placements]
        self.masters = self.parameters
        if local.dtype != torch.float32:
            self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self.parameters]
            for parameter, master in zip(self.parameters, self.masters):
                parameter.register_post_accumulate_grad_hook(partial(_hand_over, master))  # type: ignore[no-untyped-call]
        self._master = dict(zip(self.parameters, self.masters))
        replicas = mesh.replicas
        self.update = Update(
            kind,
            [
                # The replicas take turns in writing parameters.
                Piece(placement, master, copies=replicas.size, writes=number % replicas.size == replicas.rank)
                for number, (placement, master) in enumerate(zip(local.placements, self.masters))
            ],
            mesh,
        )

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradients of `loss`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def accumulation(self) -> AbstractContextManager[None]:
        """Wraps a schedule's backward passes; does nothing, since gradients accumulate anyway."""
        return nullcontext()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns the gradient accumulated on this rank."""
        gradient = self._master[parameter].grad
        assert gradient is not None, "every parameter takes part in every step"
        return gradient

    def step(self, learning_rate: float) -> Tensor:
        """Applies and clears the gradients; returns their global norm before clipping.

        Applies nothing if the norm is not finite.
        """
        if self.mesh.replicas.size > 1:
            self._average_gradients()
        norm = self.update.apply(learning_rate)
        self._round_masters()
        return norm

    def _round_masters(self) -> None:
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_([*self.parameters], [*self.masters])

    def _average_gradients(self) -> None:
        bucket: list[Tensor] = []
        for parameter in self.parameters:
            bucket.append(self.gradient(parameter))
            if sum(gradient.numel() for gradient in bucket) >= _BUCKET_ELEMENTS:
                self._average(bucket)
                bucket = []
        self._average(bucket)

    def _average(self, bucket: list[Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, dist.ReduceOp.AVG, group=self.mesh.replicas.group)
        for gradient, averaged in zip(bucket, torch.split(flat, [gradient.numel() for gradient in bucket])):
            gradient.copy_(averaged.view_as(gradient))

    def fragments(self) -> Iterator[Fragment]:
        """Yields the state on this rank."""
        return self.update.fragments()

    def loaded(self, step: int) -> None:
        """Adopts fragments that were filled with the state after `step` updates."""
        self.update.loaded(step)
        self._round_masters()


def _hand_over(master: nn.Parameter, parameter: Tensor) -> None:
    """Adds the gradient of bf16 weights to their master's; one in fp32 on bf16 weights would break a compiled graph."""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad += parameter.grad
    parameter.grad = None
