"""The kernels under ring attention, in each of the two ways in which a ring calls them."""

import pytest
import torch
from dense_attention import batch_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from triplane.model import flash
from triplane.model.attend import SegmentAttention
from triplane.model.rule import Rule

QUERIES, KEYS, HEADS, KV_HEADS, HEAD_DIM = 40, 64, 6, 2, 16
BOUNDS = (0, 7, 8, 64)
RULE = Rule(scale=0.3)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def segments(device: str) -> flash.Segments:
    bounds_int32 = torch.tensor((0, 0, *BOUNDS, KEYS), dtype=torch.int32, device=device)  # two of them empty
    return flash.Segments(bounds_int32, longest=56)


def inputs(queries: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries, HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS), (queries, HEADS)]
    return [torch.randn(*shape, HEAD_DIM, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_output_lse_and_gradients(device: str, causal: bool) -> None:
    q, k, v, grad = inputs(KEYS if causal else QUERIES, device)
    runs = segments(device) if causal else None
    out, lse = flash.forward(q, k, v, runs, RULE)
    found = [out, *flash.backward(grad, q, k, v, out, lse, runs, RULE)]

    q, k, v = (x.cpu().float().requires_grad_() for x in (q, k, v))
    if causal:
        expected = SegmentAttention(RULE)(q, k, v, batch_of(BOUNDS))
    else:
        q_1HTK, k_1GSK, v_1GSK = (x.transpose(0, 1)[None] for x in (q, k, v))
        expected = F.scaled_dot_product_attention(q_1HTK, k_1GSK, v_1GSK, scale=RULE.scale, enable_gqa=True)
        expected = expected[0].transpose(0, 1)
        scores_HTS = torch.einsum("thk,shk->hts", q, k.repeat_interleave(HEADS // KV_HEADS, 1)) * RULE.scale
        torch.testing.assert_close(lse.cpu(), scores_HTS.logsumexp(-1), rtol=0, atol=1e-2)
    gradients = torch.autograd.grad(expected, (q, k, v), grad.cpu().float())
    for x, y in zip(found, (expected, *gradients), strict=True):
        assert (x.cpu() - y).norm() < 1e-2 * y.norm()


def without_data(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


@pytest.mark.parametrize(("causal", "rule"), [(True, RULE), (False, RULE), (True, Rule(scale=0.3, window=5))])
def test_the_cuda_kernels_take_these_arguments(causal: bool, rule: Rule) -> None:
    """Schemas and shapes only, on tensors without data, so that a machine without a GPU checks them too."""
    tensors, runs = inputs(KEYS if causal else QUERIES), segments("cpu") if causal else None
    with FakeTensorMode():
        q, k, v, grad = map(without_data, tensors)
        if runs is not None:
            runs = flash.Segments(without_data(runs.bounds_int32), runs.longest)
        out, lse = flash.forward(q, k, v, runs, rule)
        assert out.shape == grad.shape and lse.shape == (HEADS, len(grad)) and lse.dtype == torch.float32
        grads = flash.backward(grad, q, k, v, out, lse, runs, rule)
        assert [(x.shape, x.device.type) for x in grads] == [(x.shape, "cuda") for x in (q, k, v)]


def test_fp32_on_cuda_is_refused() -> None:
    tensors = inputs(QUERIES, dtype=torch.float32)
    with FakeTensorMode():
        q, k, v, _ = map(without_data, tensors)
        with pytest.raises(AssertionError, match="fp32"):
            flash.forward(q, k, v, None, RULE)
