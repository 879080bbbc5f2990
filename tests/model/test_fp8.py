"""8-bit products against fp32 ones, on the CPU's own kernel."""

import pytest
import torch
from small_models import packed, random_documents, small_config, small_model
from torch import Tensor
from torch.nn import functional as F

from triplane.model.fp8 import product, use_fp8
from triplane.model.modules import Multiplying


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_products_and_gradients_err_by_what_the_formats_round(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, direction = (torch.randn(shape, generator=generator) for shape in ((64, 96), (128, 96), (64, 128)))
    x, direction = x * scale, direction * scale
    answers = []
    for multiplied, width in ((F.linear, torch.float32), (product, dtype)):
        leaves = [leaf.to(width).requires_grad_() for leaf in (x, weight)]
        out = multiplied(*leaves)
        answers.append((out, *torch.autograd.grad(out, leaves, direction.to(width))))
    # Rounding to 3 bits of mantissa errs by 2.6 % (root mean square), to 2 bits by 5.1 %.
    for (theirs, ours), expected in zip(zip(*answers), (0.026 * 2**0.5, 0.057, 0.057)):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) == pytest.approx(expected, rel=0.1)


def test_the_blocks_compute_in_fp8_with_the_same_parameters() -> None:
    config = small_config()
    plain, eight = small_model(config), small_model(config)
    before = dict(eight.named_parameters())
    use_fp8(eight)
    assert {name: id(p) for name, p in eight.named_parameters()} == {name: id(p) for name, p in before.items()}
    swapped = [module for module in eight.modules() if isinstance(module, Multiplying) and module.product is product]
    assert len(swapped) == 7 * config.n_layers
    batch = packed(random_documents(config, [5, 17, 1, 9]))
    losses = [model(batch).objective for model in (plain, eight)]
    assert 0 < abs(losses[1] / losses[0] - 1).item() < 0.02
    for loss in losses:
        loss.backward()
    for (name, theirs), ours in zip(plain.named_parameters(), eight.parameters()):
        assert ours.grad is not None and theirs.grad is not None
        assert 1e-4 < relative_error(ours.grad, theirs.grad) < 0.3, name


def test_zeros_stay_zeros() -> None:
    assert product(torch.zeros(16, 16), torch.randn(16, 16)).eq(0).all()
