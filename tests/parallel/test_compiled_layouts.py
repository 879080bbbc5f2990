"""Blocks are compiled under every layout that accepts `compile`, whatever is recomputed."""

from functools import partial
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx  # imported before the ranks fork
from torch._dynamo.utils import counters

from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.rules import layout_problems
from triplane.prove.forked import run_ranks
from triplane.prove.networks import network
from triplane.prove.reference import proof_batch, proof_engine, proof_model

CASES: list[tuple[dict[str, Any], int]] = [
    ({"dp": 2, "recompute": "selective"}, 0),
    ({"dp": 2, "recompute": "full"}, 0),
    ({"dp": 2, "zero": 3}, 0),
    ({"dp": 2, "zero": 3, "recompute": "selective"}, 0),
    ({"tp": 2, "recompute": "full"}, 0),
    ({"tp": 2, "sequence_parallel": True, "recompute": "selective"}, 0),
    ({"cp": 2, "recompute": "selective"}, 0),
    ({"cp": 2, "cp_method": "ring", "recompute": "full"}, 1),  # between what stands before and after its attention
    ({"pp": 2}, 0),
    ({"dp": 2, "ep": 2}, 0),
    ({"dp": 2, "ep": 2, "zero": 3, "recompute": "selective"}, 0),
]
"""Layouts, and how often the graph of a block is interrupted."""


def _graphs(mesh: Mesh, layout: ParallelConfig) -> tuple[int, int]:
    """Graphs that a step has compiled, and reasons why one ended before its block did."""
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    with torch._dynamo.config.patch(disable=False):  # the other tests compile nothing
        model = network(proof_model(), ("experts, one shared",) if layout.ep > 1 else ())
        engine = proof_engine(mesh, model, layout, dtype=torch.bfloat16)
        engine.forward_backward([proof_batch(engine.config, 0, [mesh.dp.rank + i]) for i in range(2)])
        engine.step(1e-3)
    return counters["stats"]["unique_graphs"], len(counters["graph_break"])


@pytest.mark.parametrize(("axes", "interrupted"), CASES, ids=str)
def test_blocks_are_compiled(axes: dict[str, Any], interrupted: int) -> None:
    layout = ParallelConfig(**({"dp": 1} | axes), compile=True)
    for graphs, breaks in run_ranks(layout, 2, _graphs, layout):
        assert graphs
        assert breaks == interrupted


def test_what_would_compile_nothing_is_refused() -> None:
    layout = ParallelConfig(cp=2, cp_method="ring", compile=True, recompute="selective")
    (problem,) = layout_problems(proof_model(), layout, "bf16")
    assert "nothing would be compiled" in problem
