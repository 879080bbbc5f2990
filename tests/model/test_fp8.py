"""8-bit products against fp32 ones, on the CPU's own kernel."""

import pytest
import torch
from small_models import packed, random_documents, small_config, small_model
from torch import Tensor, nn

from triplane.model.fp8 import Float8Linear, use_fp8


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_products_and_gradients_err_by_what_the_formats_round(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, direction = (torch.randn(shape, generator=generator) for shape in ((64, 96), (128, 96), (64, 128)))
    x, direction = x * scale, direction * scale
    plain = nn.Linear(96, 128, bias=False)
    plain.weight = nn.Parameter(weight)
    eight = Float8Linear(nn.Linear(96, 128, bias=False, dtype=dtype))
    eight.weight.data.copy_(weight)
    answers = []
    for linear in (plain, eight):
        leaf = x.to(linear.weight.dtype).requires_grad_()
        out = linear(leaf)
        answers.append((out, *torch.autograd.grad(out, (leaf, linear.weight), direction.to(out.dtype))))
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
    assert sum(isinstance(module, Float8Linear) for module in eight.modules()) == 7 * config.n_layers
    batch = packed(random_documents(config, [5, 17, 1, 9]))
    losses = [model(batch).objective for model in (plain, eight)]
    assert 0 < abs(losses[1] / losses[0] - 1).item() < 0.02
    for loss in losses:
        loss.backward()
    for (name, theirs), ours in zip(plain.named_parameters(), eight.parameters()):
        assert ours.grad is not None and theirs.grad is not None
        assert 1e-4 < relative_error(ours.grad, theirs.grad) < 0.3, name


def test_zeros_stay_zeros() -> None:
    out = Float8Linear(nn.Linear(16, 16, bias=False))(torch.zeros(16, 16))
    assert out.eq(0).all()
