"""fp8 behind its flag: the same under every layout, near fp32, refused where no GPU multiplies it."""

import pytest
import torch

from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.prove.reference import Trace, proof_engine, proof_model, train_on_mesh, train_plainly

STEPS = 4


def _train(mesh: Mesh, layout: ParallelConfig) -> Trace:
    return train_on_mesh(proof_engine(mesh, proof_model(), layout, dtype=torch.bfloat16), range(STEPS))


@pytest.fixture(scope="module")
def one_rank() -> Trace:
    layout = ParallelConfig(fp8=True)
    return run_ranks(layout, 1, _train, layout)[0]


@pytest.mark.parametrize("axes", [{"dp": 2, "zero": 3}, {"pp": 2}, {"dp": 2, "recompute": "full"}], ids=str)
def test_layouts_multiply_alike(axes: dict, one_rank: Trace) -> None:
    layout = ParallelConfig(fp8=True, **axes)
    for trace in run_ranks(layout, 2, _train, layout):
        assert trace.losses == pytest.approx(one_rank.losses, abs=2e-3)


def test_it_follows_fp32_but_is_not_fp32(one_rank: Trace) -> None:
    exact = train_plainly(proof_model(), STEPS)
    assert one_rank.losses == pytest.approx(exact.losses, abs=2e-2)
    bf16 = run_ranks(ParallelConfig(), 1, _train, ParallelConfig())[0]
    assert one_rank.losses != bf16.losses
