"""Silent failures of megatron-core, and our guards against them."""

from typing import Any

import pytest
import torch

from triplane.parallel import megatron
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.stages import group_size
from triplane.prove.forked import run_ranks

TP2 = ParallelConfig(tp=2)


def _sum_of_transposed(mesh: Mesh) -> str:
    try:
        megatron.sum_over_tp(torch.ones(2, 3).T, mesh)
    except AssertionError as error:
        return str(error)
    return "summed"


def test_a_sum_of_what_is_not_contiguous_is_refused() -> None:
    """It would come back unreduced."""
    assert run_ranks(TP2, 2, _sum_of_transposed) == ["sum_over_tp needs a contiguous tensor"] * 2


def _gradient_through_copy(mesh: Mesh) -> torch.Tensor:
    x = torch.zeros(2, 3, requires_grad=True)
    copied = megatron.copy_to_tp(x, mesh)
    copied.backward(torch.full((3, 2), 1.0 + mesh.tp.rank).T)
    assert x.grad is not None
    return x.grad


def test_a_gradient_that_is_not_contiguous_is_summed() -> None:
    for gradient in run_ranks(TP2, 2, _gradient_through_copy):
        assert gradient.equal(torch.full((2, 3), 3.0))


@pytest.mark.parametrize(
    ("micro_batches", "stages", "size"), [(4, 2, 2), (5, 2, 3), (3, 2, 3), (2, 2, 2), (8, 4, 4), (9, 4, 5), (7, 4, 7)]
)
def test_any_number_of_micro_batches_passes_the_interleaved_schedule(
    micro_batches: int, stages: int, size: int
) -> None:
    assert group_size(micro_batches, stages) == size


def test_too_few_micro_batches_are_refused() -> None:
    with pytest.raises(AssertionError, match="needs 4 micro-batches, not 3"):
        group_size(3, 4)


def _module_torch(_: Mesh) -> Any:
    made = megatron.layers.torch.zeros(1, device="cuda")
    return made.device.type, torch.cuda.current_device is megatron.layers.torch.cuda.current_device


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is replaced")
def test_only_megatrons_own_modules_take_the_cpu_for_cuda() -> None:
    assert run_ranks(TP2, 2, _module_torch) == [("cpu", False)] * 2
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
