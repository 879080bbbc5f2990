"""A small model trained for 20 steps in plain torch, and the same steps under any layout.

Adam's eps is 1e-3: at 1e-8, rounding noise in gradients near zero is amplified to full steps, and weights
drift by 1e-3 while the gradients agree.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.store import CheckpointStore
from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.config import ModelConfig
from triplane.model.init import initial_weight
from triplane.model.transformer import Transformer
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.engine import Engine
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment
from triplane.training.config import OptimizerConfig
from triplane.training.optimizer import adamw

STEPS, SEQUENCES, SEQ_LEN, CLIP, SEED = 20, 8, 16, 0.5, 3
TOLERANCE = 1e-5


def model_config(tied: bool = False) -> ModelConfig:
    return ModelConfig(
        vocab_size=61,
        dim=32,
        n_layers=5,
        n_heads=8,
        n_kv_heads=2,
        head_dim=8,
        hidden_dim=48,
        init_std=0.1,
        z_loss_weight=1e-3,
        tie_embeddings=tied,
    )


State = dict[str, Tensor]
"""Whole tensors by key: `weight/NAME`, `exp_avg/NAME` (the mean gradient), `exp_avg_sq/NAME`."""


class Trace(NamedTuple):
    losses: list[float]
    norms: list[float]
    state: State | list[Fragment]
    """After the last step: whole, or the boxes that a rank holds."""


def learning_rate(step: int) -> float:
    return 1e-2 * min(1.0, (step + 1) / 5)


def sequence(step: int, number: int) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens, targets, and document bounds: two packed documents, no loss across their boundary."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(0, 61, (SEQ_LEN + 1,), generator=generator)
    tokens = tokens.cumsum(0) // 3 % 61
    cut = int(torch.randint(1, SEQ_LEN, (1,), generator=generator))
    targets = tokens[1:].clone()
    targets[cut - 1] = IGNORED_TARGET
    return tokens[:-1], targets, [0, cut, SEQ_LEN]


def batch(step: int, numbers: Iterable[int]) -> Batch:
    parts = [sequence(step, number) for number in numbers]
    bounds = sorted({i * SEQ_LEN + cut for i, (_, _, cuts) in enumerate(parts) for cut in cuts})
    return Batch.build(torch.cat([t for t, _, _ in parts]), torch.cat([t for _, t, _ in parts]), bounds)


def make_optimizer(parameters: Iterable[tuple[nn.Parameter, torch.Size]]) -> torch.optim.Optimizer:
    return adamw(OptimizerConfig(lr=1.0, eps=1e-3), parameters)


def reference(config: ModelConfig) -> Trace:
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offsets, sizes = (0,) * parameter.dim(), tuple(parameter.shape)
            parameter.copy_(initial_weight(config, SEED, name, parameter.shape, offsets, sizes))
    optimizer = make_optimizer((p, p.shape) for p in model.parameters())
    losses, norms = [], []
    for step in range(STEPS):
        whole = batch(step, range(SEQUENCES))
        loss = model(whole)
        mean = loss.objective / (whole.targets_T != IGNORED_TARGET).sum()
        mean.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    state = {f"weight/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state |= {f"{kind}/{name}": optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq")}
    return Trace(losses, norms, state)


def train(
    mesh: Mesh,
    config: ModelConfig,
    layout: ParallelConfig,
    dtype: torch.dtype = torch.float32,
    steps: range = range(STEPS),
    load: Path | None = None,
    save: Path | None = None,
) -> Trace:
    """Runs `steps` on this rank, from the checkpoint `load` or from initial weights; writes one under `save`."""
    engine = Engine(config, layout, mesh, dtype, SEQ_LEN, CLIP, make_optimizer)
    if load is None:
        engine.initialize(SEED)
    else:
        Checkpoint(load).fill(engine.optimizer.fragments())
        engine.optimizer.loaded(steps.start)
    share = SEQUENCES // mesh.dp.size
    first = mesh.dp.rank * share
    losses, norms = [], []
    for step in steps:
        batches = [batch(step, range(first + i, first + i + 2)) for i in range(0, share, 2)]
        loss = engine.forward_backward(batches)
        norms.append(float(engine.step(learning_rate(step))))
        losses.append(float(loss.cross_entropy + loss.z))
    if save is not None:
        CheckpointStore(save, CheckpointConfig(keep_last=100)).save(steps.stop, engine.optimizer.fragments(), {})
    return Trace(losses, norms, [replace(f, data=f.data.clone()) for f in engine.optimizer.fragments()])


def max_difference(trace: Trace, one: Trace) -> float:
    """The largest of loss, gradient norm and state against those of one process."""
    assert len(trace.losses) == len(one.losses)
    scalars = zip(trace.losses + trace.norms, one.losses + one.norms)
    return max(*(abs(a - b) for a, b in scalars), *(state_difference(f, one) for f in trace.state))


def state_difference(fragment: Fragment, one: Trace) -> float:
    whole = one.state[fragment.key]
    box = tuple(slice(start, start + size) for start, size in zip(fragment.offsets, fragment.data.shape))
    return float((fragment.data - whole[box]).abs().max())


LAYOUTS = {
    "one": (ParallelConfig(zero=0), 1),
    "zero1": (ParallelConfig(zero=1), 1),
    "dp2": (ParallelConfig(zero=0), 2),
    "zero1 dp2": (ParallelConfig(zero=1), 2),
    "tp2": (ParallelConfig(tp=2, zero=0), 2),
    "zero1 tp2": (ParallelConfig(tp=2, zero=1), 2),
    "pp2": (ParallelConfig(pp=2, zero=0), 2),
    "zero1 pp2": (ParallelConfig(pp=2, zero=1), 2),
    "tp2 pp2": (ParallelConfig(tp=2, pp=2, zero=0), 4),
    "zero1 tp2 pp2": (ParallelConfig(tp=2, pp=2, zero=1), 4),
    "tp2 dp2": (ParallelConfig(tp=2, zero=0), 4),
    "zero1 tp2 dp2": (ParallelConfig(tp=2, zero=1), 4),
    "zero1 pp2 dp2": (ParallelConfig(pp=2, zero=1), 4),
}
