"""Trains a small model in plain torch and under a layout, and measures how far apart they are.

Adam's eps is 1e-3: at 1e-8, rounding noise in gradients near zero is amplified to full steps, and weights drift
apart by 1e-3 although the gradients agree.
"""

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from math import inf
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.config import ModelConfig
from triplane.model.init import initial_weight
from triplane.model.parts.gated import Gated
from triplane.model.parts.softmax import Softmax
from triplane.model.transformer import Transformer
from triplane.parallel.config import ParallelConfig
from triplane.parallel.engine import Engine
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment, place
from triplane.parallel.update import AVERAGE, Piece, set_rate
from triplane.prove.experts import ExpertsOf
from triplane.training.optimizers.adamw import AdamW
from triplane.training.optimizers.kinds import AnyOptimizer
from triplane.training.optimizers.muon import Muon

SEQUENCES, SEQ_LEN = 8, 48
SEED = 3
"""Seed of the initial weights and of the data."""
_COMMON: dict[str, Any] = {"eps": 1e-3, "grad_clip": 0.5}
OPTIMIZERS: dict[str, AnyOptimizer] = {
    "adamw": AdamW(**_COMMON),
    "muon": Muon(kind="muon", iterate_in="fp32", **_COMMON),
    "muon by head": Muon(
        kind="muon", iterate_in="fp32", by_head=True, coefficients="classic", scaling="original", **_COMMON
    ),
    "averaged": AdamW(average_decay=0.3, **_COMMON),
    "normuon": Muon(kind="muon", iterate_in="fp32", second_moment_decay=0.9, **_COMMON),
}
"""Those of the proof; Lion is none, since the sign of a gradient near zero is that of its rounding."""
_MICRO_BATCH_SIZE = 2
_TIE = 1e-6
"""Scores of experts that are so close may change places by rounding, which is near 1e-7."""
_SEEDS = 20
"""Tried at most; one in five has a close call."""


State = dict[str, Tensor]
"""Whole weights and moments, fp32, by key: `weight/NAME`, and of AdamW `exp_avg/NAME` and `exp_avg_sq/NAME`."""


@dataclass(frozen=True)
class Trace:
    """Results of a training run."""

    losses: list[float]
    norms: list[float]
    """Gradient norm of each step, before clipping."""
    state: State | list[Fragment]
    """State after the last step: whole, or the boxes that a rank holds."""
    tokens_per_s: float
    seed: int = SEED
    closest_call: float = inf
    """Of the selection of experts, in scores; see experts.py."""

    def after(self, step: int) -> "Trace":
        """Returns the trace without the losses and norms of the first `step` steps."""
        return replace(self, losses=self.losses[step:], norms=self.norms[step:])


@dataclass(frozen=True)
class Difference:
    """The distance between two traces: largest absolute differences, or root mean squares."""

    loss: float
    norm: float
    weight: float
    moment: float

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.weight, self.moment)

    def within(self, tolerance: "Difference") -> bool:
        """Returns whether each value is at most that of `tolerance`; False for a NaN."""
        return all(found <= allowed for found, allowed in zip(astuple(self), astuple(tolerance)))


def proof_model(tie_embeddings: bool = False, vocab_size: int = 61) -> ModelConfig:
    """Returns a small model with grouped queries, biases, a prime vocabulary, z-loss, and uneven pipeline stages."""
    return ModelConfig(
        vocab_size=vocab_size,
        dim=32,
        n_layers=5,
        attention=Softmax(n_heads=8, n_kv_heads=2, head_dim=8, qkv_bias=True),
        feed_forward=Gated(hidden_dim=48),
        init_std=0.1,
        z_loss_weight=1e-3,
        tie_embeddings=tie_embeddings,
    )


def proof_batch(config: ModelConfig, step: int, numbers: Iterable[int], *, seed: int = SEED) -> Batch:
    """Returns sequences of two packed documents, or in every third step of one, with different numbers of targets.

    No target crosses a document boundary. Most documents are longer than the shares of context parallelism. Steps 1, 5,
    9 and so on cut their sequences in half, since kernels take documents of equal lengths in another way.
    """
    tokens: list[Tensor] = []
    targets: list[Tensor] = []
    bounds = [0]
    for number in numbers:
        generator = torch.Generator().manual_seed(1_000_000 * (seed - SEED) + 1000 * step + number)
        drawn = torch.randint(0, config.vocab_size, (SEQ_LEN + 1,), generator=generator)
        text = drawn.cumsum(0) // 3 % config.vocab_size
        following = text[1:].clone()
        following[: 5 * (number % 3)] = IGNORED_TARGET
        if step % 3 < 2:
            drawn_cut = int(torch.randint(1, SEQ_LEN, (1,), generator=generator))
            cut = SEQ_LEN // 2 if step % 4 == 1 else drawn_cut
            following[cut - 1] = IGNORED_TARGET
            bounds.append(bounds[-1] + cut)
        bounds.append(SEQ_LEN * (1 + len(tokens)))
        tokens.append(text[:-1])
        targets.append(following)
    return Batch.build(torch.cat(tokens), torch.cat(targets), bounds, sequences=len(tokens))


def train_plainly(config: ModelConfig, steps: int, seed: int = SEED, optimizer: str = "adamw") -> Trace:
    """Trains the reference: a loop in plain torch over the plain model, in one process, in fp32, on whole batches."""
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offsets, sizes = (0,) * parameter.dim(), tuple(parameter.shape)
            weight = initial_weight(config, seed, name, shape=parameter.shape, offsets=offsets, sizes=sizes)
            parameter.copy_(weight)
    kind, mesh = OPTIMIZERS[optimizer], Mesh.of_one(torch.device("cpu"))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    placements = place(model, mesh, local=shapes, tied={})
    pieces = [Piece(placed, placed.parameter) for placed in placements if placed.parameter.requires_grad]
    state: State = {f"weight/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    updates = kind.build(pieces, mesh)
    homes = {id(weight): update for update in updates for group in update.param_groups for weight in group["params"]}
    for piece in pieces:
        moments = {name: piece.zeros(each) for name, each in kind.moments(piece.placement.weight).items()}
        homes[id(piece.weight)].state[piece.weight] = {"step": torch.zeros(()), **moments}
        state |= {f"{name}/{piece.placement.name}": moment for name, moment in moments.items()}
    layers = ExpertsOf(model)
    losses, norms = [], []
    start_s = perf_counter()
    for step in range(steps):
        batch = proof_batch(config, step, range(SEQUENCES), seed=seed)
        loss = model(batch.ahead(config.n_blocks - config.n_layers)).objective / (
            batch.targets_T != IGNORED_TARGET
        ).sum() + layers.added_losses(SEQ_LEN)
        loss.backward()
        norm = _norm(model.parameters())
        norms.append(float(norm))
        nn.utils.clip_grads_with_norm_(model.parameters(), kind.grad_clip, norm)
        for update in updates:
            set_rate(update, _learning_rate(step))
            update.step()
            update.zero_grad()
        if kind.average_decay is not None:
            decay = min(kind.average_decay, step / (step + 9))
            for piece in pieces:
                key, weight = f"{AVERAGE}/{piece.placement.name}", piece.weight.detach()
                state[key] = decay * state[key] + (1 - decay) * weight if step else weight.clone()
        layers.update_biases()
        losses.append(loss.item())
    rate = _tokens_per_s(steps, start_s)
    return Trace(
        losses=losses, norms=norms, state=state, tokens_per_s=rate, seed=seed, closest_call=layers.closest_call
    )


def reference_trace(config: ModelConfig, steps: int, optimizer: str = "adamw") -> Trace:
    """Trains plainly from the first seed without a close call, which rounding could decide in another way."""
    for seed in range(SEED, SEED + _SEEDS):
        trace = train_plainly(config, steps, seed, optimizer)
        if trace.closest_call > _TIE:
            break
    return trace


def proof_engine(
    mesh: Mesh,
    config: ModelConfig,
    layout: ParallelConfig,
    *,
    dtype: torch.dtype,
    seed: int = SEED,
    optimizer: str = "adamw",
) -> Engine:
    """Returns a rank's engine with the initial weights of `train_plainly`."""
    engine = Engine(
        config,
        layout,
        mesh,
        dtype=dtype,
        seq_len=SEQ_LEN,
        optimizer=OPTIMIZERS[optimizer],
    )
    engine.initialize(seed)
    return engine


def train_on_mesh(engine: Engine, steps: range, seed: int = SEED) -> Trace:
    """Trains the steps of `train_plainly` with an engine."""
    dp = engine.mesh.dp
    assert SEQUENCES % dp.size == 0, dp.size
    share = SEQUENCES // dp.size
    first = dp.rank * share
    each = max(1, min(_MICRO_BATCH_SIZE, share // engine.mesh.pp.size))
    losses, norms = [], []
    start_s = perf_counter()
    for step in steps:
        numbers = [range(start, start + each) for start in range(first, first + share, each)]
        batches = [proof_batch(engine.config, step, some, seed=seed).to(engine.mesh.device) for some in numbers]
        loss = engine.forward_backward(batches)
        norms.append(float(engine.step(_learning_rate(step))))
        losses.append(float(loss.objective))
    rate = _tokens_per_s(len(steps), start_s)
    boxes = [replace(box, data=box.data.cpu().clone()) for box in engine.fragments()]
    return Trace(losses=losses, norms=norms, state=boxes, tokens_per_s=rate)


def largest_difference(trace: Trace, reference: Trace) -> Difference:
    """Returns the largest differences of a rank's trace from `reference`: relative norms, absolute others."""
    weight = moment = 0.0
    for box, differing in _differing(trace, reference):
        largest = float(differing.abs().max())
        if box.kind == "weight":
            weight = max(weight, largest)
        else:
            moment = max(moment, largest)
    loss, norm = (max(map(abs, values)) for values in (_losses(trace, reference), _norms(trace, reference)))
    return Difference(loss=loss, norm=norm, weight=weight, moment=moment)


def typical_difference(trace: Trace, reference: Trace, device: torch.device) -> Difference:
    """Returns medians over steps of loss and relative norm, and root mean squares over weights and moments. Collective.

    These vary far less from seed to seed than the largest differences do.
    """
    totals = torch.zeros(2, 2, dtype=torch.float64)  # (weight, moment) x (sum of squares, elements)
    for box, differing in _differing(trace, reference):
        if box.primary:
            totals[int(box.kind != "weight")] += torch.tensor([float(differing.square().sum()), differing.numel()])
    totals = totals.to(device)
    dist.all_reduce(totals)
    weight, moment = (totals[:, 0] / totals[:, 1]).sqrt().tolist()
    losses, norms = _losses(trace, reference), _norms(trace, reference)
    return Difference(loss=median(map(abs, losses)), norm=median(map(abs, norms)), weight=weight, moment=moment)


def _differing(trace: Trace, reference: Trace) -> Iterator[tuple[Fragment, Tensor]]:
    """Yields each box of a rank and the differences of its elements from those of `reference`, fp64."""
    assert isinstance(trace.state, list) and isinstance(reference.state, dict)
    for box in trace.state:
        spans = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.data.shape))
        yield box, box.data.double() - reference.state[box.key][spans]


def _losses(trace: Trace, reference: Trace) -> list[float]:
    return [ours - theirs for ours, theirs in zip(trace.losses, reference.losses, strict=True)]


def _norms(trace: Trace, reference: Trace) -> list[float]:
    """Returns the relative differences."""
    return [(ours - theirs) / theirs for ours, theirs in zip(trace.norms, reference.norms, strict=True)]


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the norm of all gradients, summed in fp64, since torch's fp32 norm is wrong for large tensors."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().float()


def _learning_rate(step: int) -> float:
    return 3e-3 * min(1.0, (step + 1) / 5)


def _tokens_per_s(steps: int, start_s: float) -> float:
    return steps * SEQUENCES * SEQ_LEN / (perf_counter() - start_s)
