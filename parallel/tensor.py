"""Tensor parallelism: swaps modules of the plain model by the axes of their weights (Shoeybi et al. 2019).

A block needs one all-reduce in forward after each row layer, and one in backward before each branch. With sequence
parallelism (Korthikanti et al. 2022) the norms and the residual stream hold a share of the tokens: each all-reduce
becomes a reduce-scatter and an all-gather. Parameter names do not change.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from triplane.model.batch import IGNORED_TARGET
from triplane.model.block import Block
from triplane.model.head import Head
from triplane.model.modules import Linear, Multiplying, NormModule, PartModule, Stack, WeightsModule
from triplane.model.transformer import Transformer
from triplane.model.weights import Axis, Weight
from triplane.parallel import megatron
from triplane.parallel.axes import local_shape, split_dim, vocabulary_rows
from triplane.parallel.mesh import Mesh


def apply_tensor_parallel(model: Transformer, mesh: Mesh, sequence_parallel: bool) -> None:
    """Replaces the modules of `model` (on meta) by modules that hold this rank's share."""
    rows = vocabulary_rows(model.config.vocab_size, mesh.tp.size)
    enter = Gather if sequence_parallel else Copy
    if isinstance(model.embedding, nn.Embedding):
        model.embedding = megatron.VocabParallelEmbedding(
            model.embedding, rows, mesh, sequence_parallel=sequence_parallel
        )
    if isinstance(model.head, Head):
        model.leave = enter(mesh)
        model.head = VocabParallelHead(model.head, rows, mesh)
    for positions in model.kinds_of_positions:
        share = positions.n_heads // mesh.tp.size
        positions.heads = slice(mesh.tp.rank * share, (mesh.tp.rank + 1) * share)
    inside: set[nn.Module] = set()
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.enter = enter(mesh)
        for part in (block.attention, block.feed_forward):
            inside |= set(part.modules())
            for module in part.modules():
                if isinstance(module, PartModule):
                    _split_layers(module, mesh, sequence_parallel)
    for module in model.modules():
        if isinstance(module, WeightsModule):
            _split_weights(module, mesh)
            # A rank sees only its heads' part of the gradient of a weight that a branch uses, and with sequence
            # parallelism only its tokens' part of all others.
            if module in inside or sequence_parallel:
                module.shared = partial(megatron.copy_to_tp, mesh=mesh)
    if sequence_parallel:
        model.embedded = lambda x_T: x_T.chunk(mesh.tp.size)[mesh.tp.rank]


def _last_split(norm: NormModule, mesh: Mesh) -> bool:
    """Returns True if the tp ranks hold shares of what the norm averages over."""
    last = Weight("input", norm.axes[-1:], 0.0, "vector")
    return split_dim(last, mesh.tp.size) is not None


def _split_layers(part: PartModule, mesh: Mesh, sequence_parallel: bool) -> None:
    """Swaps the linear layers of a part."""
    part.copies = mesh.tp.size
    part.summed = partial(megatron.scatter_tokens if sequence_parallel else megatron.sum_over_tp, mesh=mesh)
    for name, child in list(part.named_children()):
        if isinstance(child, NormModule) and _last_split(child, mesh):
            child.mean = partial(_mean_over_tp, mesh=mesh)
        elif isinstance(child, Stack) and split_dim(child.weights["weight"], mesh.tp.size) == 2:
            child.ranks = mesh.tp.size
        elif isinstance(child, Linear):
            weight = part.weights[f"{name}.weight"]
            dim = split_dim(weight, mesh.tp.size)
            if dim is None:
                setattr(part, name, SharedLinear(child, _needed(weight.axes[0], mesh), mesh))
            elif dim == 0:
                setattr(part, name, megatron.ColumnParallelLinear(child, mesh))
            else:
                setattr(part, name, megatron.RowParallelLinear(child, mesh, sequence_parallel))


def _split_weights(module: WeightsModule, mesh: Mesh) -> None:
    """Narrows a module's own parameters to this rank's share."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        weight = module.weights[name]
        if split_dim(weight, mesh.tp.size) is not None:
            module.split.add(name)
            setattr(module, name, nn.Parameter(parameter.new_empty(local_shape(weight, mesh.tp.size))))


def _mean_over_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """Averages over the last dim, of which each rank holds a share; each rank's use of the mean has a gradient."""
    assert mesh.tp.group is not None, "one rank holds all"
    # Its gradient is summed as well. The compiler does not take megatron-core's sum, in place, before its copy.
    total = collectives.all_reduce(x.sum(-1, keepdim=True), "sum", mesh.tp.group)
    return total / (x.shape[-1] * mesh.tp.size)


class Copy(nn.Module):
    """Stands before column-parallel layers: sums the gradient of their input over tp."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x_TD: Tensor) -> Tensor:
        return megatron.copy_to_tp(x_TD, self.mesh)


class Gather(Copy):
    """Gathers the tokens of all tp ranks, (T / tp, D) to (T, D); sums and scatters the gradient."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return megatron.gather_tokens(x_TD, self.mesh)


def _needed(out: Axis, mesh: Mesh) -> slice:
    """Returns what a rank needs of an output that is not split: its one key or value head, if there are fewer heads
    than ranks; else all."""
    if out.name != "kv_head":
        return slice(None)
    start = mesh.tp.rank * out.count // mesh.tp.size * out.width
    return slice(start, start + out.width)


class SharedLinear(Multiplying, nn.Module):
    """A projection that each tp rank holds whole; computes the rows that this rank's heads need."""

    def __init__(self, linear: nn.Linear, rows: slice, mesh: Mesh):
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(linear.weight))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty_like(linear.bias))
        self.mesh = mesh
        self.rows = rows

    def forward(self, x_TD: Tensor) -> Tensor:
        # Each rank sees the part of the gradient that comes from its query heads, and none of other rows'.
        weight = megatron.copy_to_tp(self.weight, self.mesh)[self.rows]
        bias = None if self.bias is None else megatron.copy_to_tp(self.bias, self.mesh)[self.rows]
        return self.product(x_TD, weight, bias)


class VocabParallelHead(Head):
    """A head that holds `rows` rows of the vocabulary; its loss is over the whole vocabulary.

    Rows past the vocabulary are zero, score minus infinity, and have no gradient.
    """

    def __init__(self, head: Head, rows: int, mesh: Mesh):
        nn.Module.__init__(self)
        vocab_size, dim = head.weight.shape
        self.weight = nn.Parameter(head.weight.new_empty(rows, dim))
        self.bias = None if head.bias is None else nn.Parameter(head.weight.new_empty(rows))
        self.scale, self.softcap, self.z_loss_weight = head.scale, head.softcap, head.z_loss_weight
        self.mesh = mesh
        self.used = min(rows, max(0, vocab_size - mesh.tp.rank * rows))

    def losses(self, logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        counted_T = targets_T != IGNORED_TARGET
        targets_T = torch.where(counted_T, targets_T, 0)
        # A copy, since the cross-entropy overwrites its logits; the target's logit is read first.
        logits_TV = logits_TV.to(torch.float32, copy=True)
        if self.used < logits_TV.shape[1]:
            logits_TV[:, self.used :] = float("-inf")
        target_logit_T = self._target_logit(logits_TV, targets_T) if self.z_loss_weight else None
        loss_T = megatron.vocab_parallel_cross_entropy(logits_TV, targets_T) * counted_T
        if target_logit_T is None:
            return loss_T.sum(), loss_T.new_zeros(())
        # The loss is the log-partition minus the target's logit.
        partition_T = (loss_T + target_logit_T) * counted_T
        return loss_T.sum(), self.z_loss_weight * partition_T.square().sum()

    def _target_logit(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        share = logits_TV.shape[1]
        local_T = targets_T - self.mesh.tp.rank * share
        here_T = (local_T >= 0) & (local_T < share)
        tokens_T = torch.arange(len(local_T), device=local_T.device)
        picked_T = logits_TV[tokens_T, local_T.clamp(0, share - 1)]  # a copy; gather would keep the logits
        return megatron.sum_over_tp(torch.where(here_T, picked_T, 0), self.mesh)
