"""Every layout trains the same model: loss, gradient norm and weights of 20 steps against one process.

The reference is a plain torch loop over the plain model. Adam's eps is 1e-3: at 1e-8, rounding noise in
gradients near zero is amplified to full steps, and weights drift by 1e-3 while the gradients agree.
"""

from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.config import ModelConfig
from triplane.model.init import initial_weight
from triplane.model.transformer import Transformer
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.engine import Engine
from triplane.parallel.mesh import Mesh

STEPS, SEQUENCES, SEQ_LEN, CLIP, SEED = 20, 8, 16, 0.5, 3
TOLERANCE = 1e-5


def model_config(tied: bool = False) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        dim=32,
        n_layers=3,  # uneven over two stages
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        hidden_dim=48,
        init_std=0.2,
        z_loss_weight=1e-3,
        tie_embeddings=tied,
    )


class Trace(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def learning_rate(step: int) -> float:
    return 1e-2 * min(1.0, (step + 1) / 5)


def sequence(step: int, number: int) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens, targets, and document bounds: two packed documents, no loss across their boundary."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(0, 64, (SEQ_LEN + 1,), generator=generator)
    tokens = tokens.cumsum(0) // 3 % 64
    cut = int(torch.randint(1, SEQ_LEN, (1,), generator=generator))
    targets = tokens[1:].clone()
    targets[cut - 1] = IGNORED_TARGET
    return tokens[:-1], targets, [0, cut, SEQ_LEN]


def batch(step: int, numbers: Iterable[int]) -> Batch:
    parts = [sequence(step, number) for number in numbers]
    bounds = sorted({i * SEQ_LEN + cut for i, (_, _, cuts) in enumerate(parts) for cut in cuts})
    return Batch.build(torch.cat([t for t, _, _ in parts]), torch.cat([t for _, t, _ in parts]), bounds)


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    parameters = [parameter for _, parameter in named]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-3)


def reference(config: ModelConfig) -> Trace:
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offsets, sizes = (0,) * parameter.dim(), tuple(parameter.shape)
            parameter.copy_(initial_weight(config, SEED, name, parameter.shape, offsets, sizes))
    optimizer = make_optimizer(model.named_parameters())
    losses, norms = [], []
    for step in range(STEPS):
        whole = batch(step, range(SEQUENCES))
        loss = model(whole)
        mean = (loss.cross_entropy + loss.z) / (whole.targets_T != IGNORED_TARGET).sum()
        mean.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return Trace(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})


def train(mesh: Mesh, config: ModelConfig, stage: int, dtype: torch.dtype) -> tuple[Trace, list]:
    engine = Engine(config, mesh, stage, dtype, CLIP, make_optimizer)
    engine.initialize(SEED)
    share = SEQUENCES // mesh.dp.size
    losses, norms = [], []
    for step in range(STEPS):
        first = mesh.dp.rank * share
        batches = [batch(step, range(first + i, first + i + 2)) for i in range(0, share, 2)]
        loss = engine.forward_backward(batches)
        norms.append(float(engine.step(learning_rate(step))))
        losses.append(float(loss.cross_entropy + loss.z))
    boxes = [(f.name, f.offsets, f.data.clone()) for f in engine.optimizer.fragments() if f.kind == "weight"]
    local = {p.name: p.parameter.detach().clone() for p in engine.local.placements}
    return Trace(losses, norms, local), boxes


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


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def expected(request: pytest.FixtureRequest) -> tuple[ModelConfig, Trace]:
    config = model_config(tied=request.param)
    return config, reference(config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_the_same_model(name: str, expected: tuple[ModelConfig, Trace]) -> None:
    layout, ranks = LAYOUTS[name]
    config, one = expected
    for trace, boxes in run_ranks(layout, ranks, train, config, layout.zero, torch.float32):
        assert max_difference(trace.losses, one.losses) < TOLERANCE
        assert max_difference(trace.norms, one.norms) < TOLERANCE
        for weight, offsets, box in boxes:
            part = tuple(slice(start, start + size) for start, size in zip(offsets, box.shape))
            assert (box - one.weights[weight][part]).abs().max() < TOLERANCE, weight


def max_difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) == STEPS
    return max(abs(x - y) for x, y in zip(a, b))
