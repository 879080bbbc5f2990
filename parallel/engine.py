"""One training step of a spread model: forward and backward of the micro-batches, then the update."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.config import ModelConfig
from triplane.model.head import Loss
from triplane.model.init import initial_weight
from triplane.model.transformer import Transformer
from triplane.parallel.apply import LocalModel, build_local_model
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment

Forward = Callable[[nn.Module, int, Tensor | None], Tensor]
"""(module, number of the micro-batch, the previous stage's output) to this stage's output or scaled loss."""

MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


class Optimizer(Protocol):
    """What updates the weights: `ReplicatedOptimizer` or `ZeroOptimizer`."""

    def step(self) -> Tensor: ...
    def fragments(self) -> Iterable[Fragment]: ...
    def loaded(self, step: int) -> None: ...


class StepLoss(NamedTuple):
    """Over the global batch, the same on all ranks; scalars on the device, so that no step waits for the host."""

    cross_entropy: Tensor
    """Mean over tokens, nats."""
    z: Tensor
    """Mean over tokens, weighted."""
    tokens: Tensor
    """Positions with a target."""


class Engine:
    """A model and its optimizer over the ranks of a mesh.

    Its state is unset until `initialize`, or until its `fragments` were filled and `loaded` was called.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        zero: int,
        dtype: torch.dtype,
        grad_clip: float,
        make_optimizer: MakeOptimizer,
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
        return self._run(batches, tokens, scale=self.mesh.dp.size / tokens, train=True)

    def evaluate(self, batches: Sequence[Batch]) -> StepLoss:
        """The loss over the batches of all dp ranks, without gradients."""
        tokens = self._count_targets(batches)
        with torch.no_grad():
            return self._run(batches, tokens, scale=torch.ones_like(tokens), train=False)

    def step(self, learning_rate: float) -> Tensor:
        """Updates the weights; returns the gradient's global norm before clipping, a scalar."""
        if self.mesh.embedding is not None and self.config.tie_embeddings:
            table = self.module.embedding or self.module.head
            assert table is not None
            dist.all_reduce(table.weight.grad, group=self.mesh.embedding)
        for group in self._torch_optimizer.param_groups:
            group["lr"] = learning_rate
        return self.optimizer.step()

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Scores of the token that follows `tokens`, (V,) fp32, the same on all ranks; collective."""
        ids_T = torch.tensor(tokens)
        batch = Batch.build(ids_T, ids_T, [0, len(tokens)]).to(self.mesh.device)
        logits_V = torch.zeros(self.config.vocab_size, device=self.mesh.device)

        def forward(module: nn.Module, _: int, received: Tensor | None) -> Tensor:
            assert isinstance(module, Transformer)
            if module.head is None:
                return module.hidden(batch, received)
            share = module.logits(batch, received)[-1].float()
            start = 0 if len(share) == len(logits_V) else self.mesh.tp.rank * len(share)
            logits_V[start : start + len(share)] = share
            return share.new_zeros(())

        with torch.no_grad():
            self._schedule(forward, 1, len(tokens), train=False)
        if self.mesh.model is not None:
            dist.all_reduce(logits_V, group=self.mesh.model)  # each share is on one rank, zeros on the others
        return logits_V

    def _count_targets(self, batches: Sequence[Batch]) -> Tensor:
        total = torch.stack([(batch.targets_T != IGNORED_TARGET).sum() for batch in batches]).sum()
        dist.all_reduce(total, group=self.mesh.dp.group)
        return total.clamp(min=1)

    def _run(self, batches: Sequence[Batch], tokens: Tensor, scale: Tensor, train: bool) -> StepLoss:
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)

        def forward(module: nn.Module, number: int, received: Tensor | None) -> Tensor:
            out = module(batches[number], received)
            if not isinstance(out, Loss):
                assert isinstance(out, Tensor)
                return out
            sums.add_(torch.stack((out.cross_entropy, out.z)))
            return out.objective * scale

        self._schedule(forward, len(batches), len(batches[0].tokens_T), train)
        if self.mesh.tp.rank:
            sums.zero_()  # tp ranks hold the same loss; one of them answers
        dist.all_reduce(sums)
        cross_entropy, z = (sums / tokens).unbind()
        return StepLoss(cross_entropy, z, tokens)

    def _schedule(self, forward: Forward, micro_batches: int, tokens: int, train: bool) -> None:
        """Runs `forward` of every micro-batch of `tokens` tokens, and its backward if `train`."""
        if self.mesh.pp.size > 1:
            from triplane.parallel import megatron

            megatron.run_1f1b(self.stage, forward, micro_batches, tokens, forward_only=not train)
            return
        for number in range(micro_batches):
            loss = forward(self.module, number, None)
            if train:
                torch.autograd.backward(loss)


def _wrap(local: LocalModel, optimizer: torch.optim.Optimizer, zero: int, grad_clip: float, mesh: Mesh) -> Optimizer:
    if zero == 0:
        from triplane.parallel.replicated import ReplicatedOptimizer

        return ReplicatedOptimizer(optimizer, local.placements, grad_clip, mesh)
    from triplane.parallel.zero import ZeroOptimizer

    return ZeroOptimizer(local.module, optimizer, local.placements, grad_clip, local.dtype, mesh)
