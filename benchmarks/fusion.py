"""Counts the kernels that torch's compiler makes of a layer, and the bytes that those beside products move.

Counts, not times, so they need no GPU: forward and backward of a layer of configs/1b.toml in bf16. It compiles for a
CPU; kernels for a GPU read and write the same tensors.
"""

import logging
from pathlib import Path

import torch
from torch._inductor import compile_fx, config, metrics
from torch._inductor.scheduler import ExternKernelSchedulerNode

from triplane.config.load import load_config
from triplane.model.batch import Batch
from triplane.model.block import Block

TOKENS = 2048


def train_layer() -> None:
    """Runs a compiled layer forward and backward, once."""
    model = load_config(Path(__file__).parents[1] / "configs/1b.toml").model
    layer = model.layer(0)
    assert layer.positions is not None
    block = Block(model, layer).to(torch.bfloat16)
    batch = Batch.build(*torch.zeros(2, TOKENS, dtype=torch.int64), range(0, TOKENS + 1, TOKENS))
    positions = layer.positions.build(model.dim, model.attention.n_heads, model.attention.turning_dim)
    tables = positions(positions.config.tables, batch.positions_T, batch.longest)
    x_TD = torch.randn(TOKENS, model.dim, dtype=torch.bfloat16, requires_grad=True)
    out_TD = torch.compile(block)(x_TD, tables, batch)
    torch.autograd.grad(out_TD, [x_TD, *block.parameters()], torch.ones_like(out_TD))


def main() -> None:
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # where it would log bytes it counts them
    with config.patch(force_disable_caches=True):
        train_layer()
    # Counted as fp32 numbers. What moves none is no kernel, but a tensor that others write into.
    moved = [(kernel, 4 * numbers) for kernel, numbers in metrics.nodes_num_elem if numbers]
    others = [count for kernel, count in moved if not isinstance(kernel, ExternKernelSchedulerNode)]
    print(f"{len(moved) - len(others)} products and attention, {len(others)} other kernels")
    print(f"the others move {sum(others) / TOKENS / 1000:.0f} KB a token")


if __name__ == "__main__":
    main()
