"""The norm is exact at any size, where torch's fp32 norm on a CPU is not."""

import pytest
import torch

from triplane.parallel.norm import squared_norm


@pytest.mark.parametrize("shape", [(7,), (20_000_000,), (3, 1_000_000), (2, 3, 9000), (5, 4096), (0,)])
def test_a_norm_is_exact_for_rows_of_any_length(shape: tuple[int, ...]) -> None:
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected = tensor.double().square().sum()
    torch.testing.assert_close(squared_norm([tensor], tensor.device), expected, rtol=1e-6, atol=0.0)
