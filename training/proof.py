"""A small training in plain torch and under a layout, and how far they are apart: what `triplane prove` shows.

Adam's eps is 1e-3: at 1e-8, rounding noise in gradients near zero is amplified to full steps, and weights drift
apart by 1e-3 while the gradients agree.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.config import ModelConfig
from triplane.model.init import initial_weight
from triplane.model.transformer import Transformer
from triplane.parallel.config import ParallelConfig
from triplane.parallel.engine import Engine
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment
from triplane.training.config import OptimizerConfig
from triplane.training.optimizer import adamw

SEQUENCES, SEQ_LEN = 8, 48
_CLIP, _SEED = 0.5, 3
_OPTIMIZER = OptimizerConfig(eps=1e-3)
_MICRO_BATCH_SIZE = 2


State = dict[str, Tensor]
"""Whole weights and moments, fp32, by key: `weight/NAME`, `exp_avg/NAME` (the mean gradient), `exp_avg_sq/NAME`."""


@dataclass(frozen=True)
class Trace:
    """What a training did."""

    losses: list[float]
    norms: list[float]
    """Of the gradient, before clipping."""
    state: State | list[Fragment]
    """After the last step: whole, or the boxes that a rank holds."""
    tokens_per_s: float


@dataclass(frozen=True)
class Difference:
    """The largest absolute differences between two traces."""

    loss: float
    norm: float
    weight: float
    moment: float

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.weight, self.moment)

    def within(self, tolerance: "Difference") -> bool:
        """Whether none is larger than that of `tolerance`; what is no number is not within."""
        return all(found <= allowed for found, allowed in zip(astuple(self), astuple(tolerance)))


def proof_model(tie_embeddings: bool = False) -> ModelConfig:
    """Every feature in little: grouped queries, biases, an odd vocabulary, z-loss, layers that stages cannot share."""
    return ModelConfig(
        vocab_size=61,
        dim=32,
        n_layers=5,
        n_heads=8,
        n_kv_heads=2,
        head_dim=8,
        hidden_dim=48,
        init_std=0.1,
        qkv_bias=True,
        z_loss_weight=1e-3,
        tie_embeddings=tie_embeddings,
    )


def proof_batch(config: ModelConfig, step: int, numbers: Iterable[int]) -> Batch:
    """Sequences of two packed documents, or of one in every third step, with fewer targets in some than in others.

    No loss crosses a boundary. Documents are longer than the shares of context parallelism.
    """
    tokens: list[Tensor] = []
    targets: list[Tensor] = []
    bounds = [0]
    for number in numbers:
        generator = torch.Generator().manual_seed(1000 * step + number)
        drawn = torch.randint(0, config.vocab_size, (SEQ_LEN + 1,), generator=generator)
        text = drawn.cumsum(0) // 3 % config.vocab_size
        following = text[1:].clone()
        following[: 5 * (number % 3)] = IGNORED_TARGET
        if step % 3 < 2:
            cut = int(torch.randint(1, SEQ_LEN, (1,), generator=generator))
            following[cut - 1] = IGNORED_TARGET
            bounds.append(bounds[-1] + cut)
        bounds.append(SEQ_LEN * (1 + len(tokens)))
        tokens.append(text[:-1])
        targets.append(following)
    return Batch.build(torch.cat(tokens), torch.cat(targets), bounds)


def train_plainly(config: ModelConfig, steps: int) -> Trace:
    """The reference: a loop in plain torch over the plain model, one process, fp32, whole batches."""
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offsets, sizes = (0,) * parameter.dim(), tuple(parameter.shape)
            parameter.copy_(initial_weight(config, _SEED, name, parameter.shape, offsets, sizes))
    optimizer = adamw(_OPTIMIZER, ((parameter, parameter.shape) for parameter in model.parameters()))
    losses, norms = [], []
    start_s = perf_counter()
    for step in range(steps):
        batch = proof_batch(config, step, range(SEQUENCES))
        loss = model(batch).objective / (batch.targets_T != IGNORED_TARGET).sum()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), _CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state: State = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        state[f"weight/{name}"] = parameter.detach()
        state |= {f"{kind}/{name}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
    return Trace(losses, norms, state, _tokens_per_s(steps, start_s))


def proof_engine(mesh: Mesh, config: ModelConfig, layout: ParallelConfig, dtype: torch.dtype) -> Engine:
    """A rank's engine, with the weights that `train_plainly` starts from."""
    engine = Engine(config, layout, mesh, dtype, SEQ_LEN, _CLIP, partial(adamw, _OPTIMIZER))
    engine.initialize(_SEED)
    return engine


def train_on_mesh(engine: Engine, steps: range) -> Trace:
    """The same steps by an engine."""
    dp = engine.mesh.dp
    assert SEQUENCES % dp.size == 0, dp.size
    share = SEQUENCES // dp.size
    first = dp.rank * share
    each = max(1, min(_MICRO_BATCH_SIZE, share // engine.mesh.pp.size))
    losses, norms = [], []
    start_s = perf_counter()
    for step in steps:
        numbers = [range(start, start + each) for start in range(first, first + share, each)]
        batches = [proof_batch(engine.config, step, some).to(engine.mesh.device) for some in numbers]
        loss = engine.forward_backward(batches)
        norms.append(float(engine.step(_learning_rate(step))))
        losses.append(float(loss.cross_entropy + loss.z))
    rate = _tokens_per_s(len(steps), start_s)
    boxes = [replace(box, data=box.data.cpu().clone()) for box in engine.optimizer.fragments()]
    return Trace(losses, norms, boxes, rate)


def difference(trace: Trace, one: Trace) -> Difference:
    """How far a rank's trace is from that of one process."""
    assert isinstance(trace.state, list) and isinstance(one.state, dict)
    weight = moment = 0.0
    for box in trace.state:
        spans = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.data.shape))
        largest = float((box.data - one.state[box.key][spans]).abs().max())
        if box.kind == "weight":
            weight = max(weight, largest)
        else:
            moment = max(moment, largest)
    return Difference(_largest(trace.losses, one.losses), _largest(trace.norms, one.norms), weight, moment)


def _largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _learning_rate(step: int) -> float:
    return 3e-3 * min(1.0, (step + 1) / 5)


def _tokens_per_s(steps: int, start_s: float) -> float:
    return steps * SEQUENCES * SEQ_LEN / (perf_counter() - start_s)
