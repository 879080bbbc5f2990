"""One training step of a spread model: forward and backward of the micro-batches, then the update."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.config import ModelConfig
from triplane.model.init import initial_weight
from triplane.model.loss import Loss
from triplane.parallel.apply import LocalModel, build_local_model
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment


class Optimizer(Protocol):
    """What updates the weights: `ReplicatedOptimizer` or `ZeroOptimizer`."""

    def step(self) -> Tensor: ...
    def fragments(self) -> Iterable[Fragment]: ...
    def loaded(self, step: int) -> None: ...


class StepLoss(NamedTuple):
    """Over the global batch, the same on all ranks; nats a token."""

    cross_entropy: float
    z: float
    tokens: int
    """Positions with a target."""


class Engine:
    """A model and its optimizer over the ranks of a mesh. Its state is uninitialised until `initialize`
    or until `fragments` were filled and `loaded` was called."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        zero: int,
        dtype: torch.dtype,
        grad_clip: float,
        make_optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    ):
        self.config = config
        self.mesh = mesh
        self.local = build_local_model(config, mesh, dtype)
        self.module = self.local.module
        named = [(placement.name, placement.parameter) for placement in self.local.placements]
        self._torch_optimizer = make_optimizer(named)
        self.optimizer = _wrap(self.local, self._torch_optimizer, zero, grad_clip, mesh)
        if mesh.pp.size > 1:
            from triplane.parallel import megatron

            self.stage = megatron.Stage(self.module, dtype, config.dim)

    def initialize(self, seed: int) -> None:
        """Gives the initial weights, which are the same for every layout."""
        for fragment in self.optimizer.fragments():
            if fragment.kind == "weight":
                sizes = tuple(fragment.data.shape)
                weight = initial_weight(self.config, seed, fragment.name, fragment.shape, fragment.offsets, sizes)
                fragment.data.copy_(weight)
        self.optimizer.loaded(step=0)

    def forward_backward(self, batches: Sequence[Batch]) -> StepLoss:
        """Adds the gradient of the mean loss over the global batch to the parameters.

        `batches` are this dp rank's micro-batches, on the device; the mean is over tokens.
        """
        tokens = self._count_targets(batches)
        # The optimizers average over dp.
        return self._run(batches, tokens, scale=self.mesh.dp.size / max(tokens, 1), train=True)

    def evaluate(self, batches: Sequence[Batch]) -> StepLoss:
        """The loss of the batches of all dp ranks, without gradients."""
        with torch.no_grad():
            return self._run(batches, self._count_targets(batches), scale=1.0, train=False)

    def step(self, learning_rate: float) -> Tensor:
        """Updates the weights; returns the gradient's global norm before clipping, a scalar."""
        if self.mesh.embedding is not None and self.config.tie_embeddings:
            table = self.module.embedding or self.module.head
            assert table is not None
            dist.all_reduce(table.weight.grad, group=self.mesh.embedding)
        for group in self._torch_optimizer.param_groups:
            group["lr"] = learning_rate
        return self.optimizer.step()

    def _count_targets(self, batches: Sequence[Batch]) -> int:
        counts = [(batch.targets_T != IGNORED_TARGET).sum() for batch in batches]
        total = torch.stack(counts).sum()
        dist.all_reduce(total, group=self.mesh.dp.group)
        return int(total)

    def _run(self, batches: Sequence[Batch], tokens: int, scale: float, train: bool) -> StepLoss:
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)

        def forward(module: nn.Module, number: int, received: Tensor | None) -> Tensor:
            out = module(batches[number], received)
            if not isinstance(out, Loss):
                assert isinstance(out, Tensor)
                return out
            sums.add_(torch.stack(out).detach())
            return (out.cross_entropy + out.z) * scale

        if self.mesh.pp.size > 1:
            from triplane.parallel import megatron

            tokens_each = len(batches[0].tokens_T)
            megatron.run_1f1b(self.stage, forward, len(batches), tokens_each, forward_only=not train)
        else:
            for number in range(len(batches)):
                loss = forward(self.module, number, None)
                if train:
                    torch.autograd.backward(loss)
        if self.mesh.tp.rank:
            sums.zero_()  # tp ranks hold the same loss; one of them answers
        dist.all_reduce(sums)
        cross_entropy, z = (sums / max(tokens, 1)).tolist()
        return StepLoss(cross_entropy, z, tokens)


def _wrap(local: LocalModel, optimizer: torch.optim.Optimizer, zero: int, grad_clip: float, mesh: Mesh) -> Optimizer:
    if zero == 0:
        from triplane.parallel.replicated import ReplicatedOptimizer

        return ReplicatedOptimizer(optimizer, local.placements, grad_clip, mesh)
    from triplane.parallel.zero import ZeroOptimizer

    return ZeroOptimizer(local.module, optimizer, local.placements, grad_clip, local.dtype, mesh)
