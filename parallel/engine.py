"""Runs training steps of a distributed model: forward and backward of the micro-batches, then the update."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import lcm
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.config import ModelConfig
from triplane.model.generate import LENGTH_MULTIPLE
from triplane.model.head import Loss
from triplane.model.init import initial_weight
from triplane.model.modules import PartModule
from triplane.model.parts.feed_forward import FeedForward
from triplane.model.transformer import Transformer
from triplane.parallel.apply import build_local_model
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment, LocalModel
from triplane.parallel.rules import token_multiple
from triplane.parallel.stages import copied_weights
from triplane.parallel.update import AVERAGE, OptimizerKind

Forward = Callable[[nn.Module, int, Tensor | None], Tensor]
"""Maps (module, micro-batch number, the previous stage's output) to this stage's output or scaled loss."""


class Optimizer(Protocol):
    """Updates the weights: `ShardedOptimizer`, `ZeroOptimizer` or `FullyShardedOptimizer`."""

    @property
    def module(self) -> nn.Module: ...
    def backward(self, loss: Tensor, last: bool) -> None: ...
    def accumulation(self) -> AbstractContextManager[None]: ...
    def gradient(self, parameter: nn.Parameter) -> Tensor: ...
    def step(self, learning_rate: float) -> Tensor: ...
    def discard(self) -> Tensor: ...
    def fragments(self) -> Iterable[Fragment]: ...
    def loaded(self, step: int) -> None: ...


class StepLoss(NamedTuple):
    """The loss over the global batch, equal on all ranks; scalars on the device, so that no step waits for the host."""

    cross_entropy: Tensor
    """Mean over tokens, nats."""
    z: Tensor
    """Mean over tokens, times its weight."""
    further: Tensor
    """Of further predictions, mean over tokens, times its weight; 0 without training."""
    tokens: Tensor
    """Positions with a target."""
    added: Tensor
    """Sum of the means of the losses that layers add; 0 without training."""
    tallies: dict[int, Tensor]
    """What layers with a tally counted, by their numbers; means over all positions."""

    @property
    def objective(self) -> Tensor:
        """What training minimizes."""
        return self.cross_entropy + self.z + self.further + self.added


class Engine:
    """A model and its optimizer over the ranks of a mesh.

    Its state is unset until `initialize`, or until its `fragments` are filled and `loaded` is called.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: ParallelConfig,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        seq_len: int,
        optimizer: OptimizerKind,
    ):
        """`seq_len` sets the cost of attention, which balances the pipeline's stages."""
        self.config = config
        self.layout = layout
        self.mesh = mesh
        self.local = build_local_model(config, layout, mesh, dtype=dtype, seq_len=seq_len)
        self._tallied = [_tallied(config, number) for number in range(config.n_blocks)]
        self._parts = dict(self._tallied_parts())
        self._counts = self._take_tallies()
        self.optimizer = _wrap(self.local, optimizer, layout, mesh)
        if mesh.pp.size > 1:
            from triplane.parallel import megatron

            self.pipeline = megatron.Pipeline(list(self.local.stages), layout, mesh, dtype=dtype, dim=config.dim)

    def initialize(self, seed: int) -> None:
        """Sets the initial weights, which are the same for every layout."""
        for fragment in self.fragments():
            if fragment.kind == "weight":
                sizes = tuple(fragment.data.shape)
                weight = initial_weight(
                    self.config, seed, fragment.name, shape=fragment.shape, offsets=fragment.offsets, sizes=sizes
                )
                fragment.data.copy_(weight)
        self.optimizer.loaded(step=0)

    def fragments(self) -> Iterator[Fragment]:
        """Yields the state on this rank, for checkpoints."""
        yield from self.optimizer.fragments()
        writes = self.mesh.tp.rank == 0 and self.mesh.replicas.rank == 0
        for name, state in self.local.states.items():
            place = (0,) * state.dim()
            yield Fragment("weight", name, shape=state.shape, offsets=place, data=state, primary=writes)

    def forward_backward(self, batches: Sequence[Batch]) -> StepLoss:
        """Computes the gradient of the mean loss over the global batch; call it once before each `step`.

        `batches` are this dp rank's micro-batches, on the device; the mean is over tokens.
        """
        tokens = self._count_targets(batches)
        # The optimizers average over dp x cp.
        return self._run(batches, tokens, scale=self.mesh.replicas.size / tokens, train=True)

    def evaluate(self, batches: Sequence[Batch]) -> StepLoss:
        """Returns the loss over the batches of all dp ranks, without gradients."""
        tokens = self._count_targets(batches)
        with torch.no_grad():
            return self._run(batches, tokens, scale=torch.ones_like(tokens), train=False)

    def step(self, learning_rate: float) -> Tensor:
        """Updates the weights; returns the gradient's global norm before clipping, a scalar."""
        norm = self.optimizer.step(learning_rate)
        counts = torch.split(self._counts, self._tallied)
        for number, part in self._parts.items():
            config = part.config
            assert isinstance(config, FeedForward)
            config.after_step(part, counts[number], norm.isfinite())
        return norm

    @contextmanager
    def averaged(self, step: int) -> Iterator[None]:
        """Puts the average of the weights after `step` updates in their place, and them back at the end. Collective."""
        self._exchange_average(step)
        yield
        self._exchange_average(step)

    def _exchange_average(self, step: int) -> None:
        found = list(self.optimizer.fragments())
        weights, averages = ([each.data for each in found if each.kind == kind] for kind in ("weight", AVERAGE))
        for weight, average in zip(weights, averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self.optimizer.loaded(step)

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Returns the scores of the token that follows `tokens`, (V,) fp32, equal on all ranks; collective."""
        # The axes that split tokens need equal shares.
        batch = Batch.padded(tokens, lcm(LENGTH_MULTIPLE, token_multiple(self.layout)))
        batch.targets_T[len(tokens) - 1] = 0  # marks the one score that is wanted
        share = self._share(batch.to(self.mesh.device))
        logits_V = torch.zeros(self.config.vocab_size, device=self.mesh.device)

        def forward(module: nn.Module, number: int, received: Tensor | None) -> Tensor:
            assert isinstance(module, Transformer)
            if module.head is None:
                return module(share, received)
            scores_TV = module.logits(share, received)[share.targets_T != IGNORED_TARGET]
            if number == 0 and len(scores_TV):
                start = self.mesh.tp.rank * scores_TV.shape[1] if self.mesh.tp.size > 1 else 0
                mine_V = logits_V[start : start + scores_TV.shape[1]]  # fewer where the vocabulary was padded
                mine_V.copy_(scores_TV[0, : len(mine_V)])
            return scores_TV.new_zeros(())

        with torch.no_grad():
            micro_batches = self.mesh.pp.size if self.layout.virtual_stages > 1 else 1
            self._schedule(forward, micro_batches, len(batch.tokens_T), train=False)
        dist.all_reduce(logits_V)  # within each dp rank, one rank has each score and the others have zero
        return logits_V / self.mesh.dp.size

    def _count_targets(self, batches: Sequence[Batch]) -> Tensor:
        total = torch.stack([(batch.targets_T != IGNORED_TARGET).sum() for batch in batches]).sum()
        dist.all_reduce(total, group=self.mesh.dp.group)
        return total.clamp(min=1)

    def _share(self, batch: Batch) -> Batch:
        """Returns this cp rank's tokens."""
        assert len(batch.tokens_T) % token_multiple(self.layout) == 0, (len(batch.tokens_T), self.layout)
        if self.mesh.cp.size == 1:
            return batch
        from triplane.parallel.context import cut_for_context

        return cut_for_context(batch, self.mesh.cp, self.layout.cp_method)

    def _run(self, batches: Sequence[Batch], tokens: Tensor, *, scale: Tensor, train: bool) -> StepLoss:
        sums = torch.zeros(3, dtype=torch.float64, device=self.mesh.device)
        positions = len(batches) * len(batches[0].tokens_T) * self.mesh.dp.size
        layer_scale = self.mesh.replicas.size / positions if train else None
        depth = self.config.n_blocks - self.config.n_layers if train else 0
        shares = [replace(self._share(batch.ahead(depth)), scale=layer_scale) for batch in batches]

        def forward(module: nn.Module, number: int, received: Tensor | None) -> Tensor:
            out = module(shares[number], received)
            if not isinstance(out, Loss):
                assert isinstance(out, Tensor)
                return out
            sums.add_(torch.stack((out.cross_entropy, out.z, out.further)))
            return out.objective * scale

        self._schedule(forward, len(batches), len(batches[0].tokens_T), train=train)
        sums = torch.cat((sums, self._take_tallies()))
        if self.mesh.tp.rank:
            sums.zero_()  # all tp ranks hold the same loss; it counts once
        dist.all_reduce(sums)
        if train:
            self._counts = sums[3:]
        (cross_entropy, z, further), means = (sums[:3] / tokens).unbind(), sums[3:] / positions
        tallies = {n: tally for n, tally in enumerate(torch.split(means, self._tallied)) if len(tally)}
        added = torch.stack([means.new_zeros(()), *(tally[0] for tally in tallies.values())]).sum()
        return StepLoss(cross_entropy, z, further, tokens=tokens, added=added, tallies=tallies)

    def _tallied_parts(self) -> Iterator[tuple[int, PartModule]]:
        """Yields this rank's layers with a tally, which starts at zero."""
        for stage in self.local.stages:
            for name, block in stage.blocks.items():
                if size := self._tallied[int(name)]:
                    part = block.get_submodule("feed_forward")
                    assert isinstance(part, PartModule)
                    part.tally = torch.zeros(size, device=self.mesh.device, requires_grad=True)
                    yield int(name), part

    def _take_tallies(self) -> Tensor:
        """Returns, for all layers, what those of this rank have counted since the last call."""
        counts = torch.zeros(sum(self._tallied), dtype=torch.float64, device=self.mesh.device)
        for number, count in enumerate(torch.split(counts, self._tallied)):
            tally = self._parts[number].tally if number in self._parts else None
            if tally is not None and tally.grad is not None:
                count.copy_(tally.grad)
                tally.grad = None
        return counts

    def _schedule(self, forward: Forward, micro_batches: int, tokens: int, *, train: bool) -> None:
        """Runs `forward` on every micro-batch of `tokens` tokens, and its backward if `train`."""
        if self.mesh.pp.size > 1:
            with self.optimizer.accumulation() if train else nullcontext():
                self.pipeline.run(forward, micro_batches, tokens, forward_only=not train)
                if train:
                    self._sum_copied_gradients()
            return
        for number in range(micro_batches):
            if not train:
                forward(self.local.stages[0], number, None)
                continue
            loss = forward(self.optimizer.module, number, None)
            self.optimizer.backward(loss, last=number == micro_batches - 1)

    def _sum_copied_gradients(self) -> None:
        """Sums the gradients of the first stage's weights and of other stages' copies of them."""
        groups = {"last": self.mesh.embedding, "every": self.mesh.pp.group}
        for name, stages in copied_weights(self.config).items():
            held = [placement.parameter for placement in self.local.placements if placement.name == name]
            if held:
                self._sum(list(map(self.optimizer.gradient, held)), groups[stages])

    def _sum(self, gradients: list[Tensor], group: ProcessGroup | None) -> None:
        """Sums gradients of copies, which may be on the host, over this rank and a group."""
        total, *others = (gradient.to(self.mesh.device) for gradient in gradients)
        for other in others:
            total += other
        dist.all_reduce(total, group=group)
        for gradient in gradients:
            if gradient is not total:
                gradient.copy_(total)


def _tallied(config: ModelConfig, number: int) -> int:
    feed_forward = config.layer(number).feed_forward
    assert feed_forward is not None
    return feed_forward.tallied


def _wrap(local: LocalModel, kind: OptimizerKind, layout: ParallelConfig, mesh: Mesh) -> Optimizer:
    if layout.shards_weights(mesh.replicas.size):
        from triplane.parallel.fully_sharded import FullyShardedOptimizer

        return FullyShardedOptimizer(local, kind, mesh)
    if not layout.uses_deepspeed:
        from triplane.parallel.sharded import ShardedOptimizer

        partitions = layout.zero == 2 and mesh.spread.shards.size > 1
        return ShardedOptimizer(local, kind, mesh, partition_gradients=partitions, offload=layout.offload_optimizer)
    from triplane.parallel.zero import ZeroOptimizer

    return ZeroOptimizer(local, kind, layout, mesh)
