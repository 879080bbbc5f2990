"""Which kernel attention runs."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from small_models import packed, random_documents, small_config, small_model
from torch.profiler import ProfilerActivity, profile

CPU_KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}
OLD_SIGNATURE = """
from torch.nn.attention import varlen
real = varlen.varlen_attn
def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert (scale, window_size) == (0.25, (-1, 0))
    return real(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size, enable_gqa=True)
varlen.varlen_attn = varlen_attn
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triplane.model.attend import SegmentAttention
from triplane.model.batch import Batch
from triplane.model.rule import Rule
batch = Batch.build(torch.zeros(8), torch.zeros(8), (0, 3, 8))
with FakeTensorMode(allow_non_fake_inputs=True):
    q, k, v = (torch.empty(8, heads, 16, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    print(tuple(SegmentAttention(Rule(scale=0.25))(q, k, v, batch).shape))
"""
"""A program in which varlen_attn has the arguments that it had in torch 2.11."""
LENGTHS = {"ragged": [5, 17, 1, 9], "equal": [8, 8, 8, 8], "one": [32]}


def attention_operators(device: str, dtype: torch.dtype, lengths: list[int], **changes: Any) -> set[str]:
    """Names of the attention operators that a forward and backward pass of a model dispatches to."""
    config = small_config(**changes)
    model = small_model(config).to(device, dtype)
    batch = packed(random_documents(config, lengths)).to(torch.device(device))
    with profile(activities=[ProfilerActivity.CPU]) as record:
        model(batch).objective.backward()
    return {event.key for event in record.key_averages() if "attention" in event.key or "attn" in event.key}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_cpu_runs_the_flash_kernel_both_ways(lengths: list[int], n_kv_heads: int, dtype: torch.dtype) -> None:
    operators = attention_operators("cpu", dtype, lengths, n_kv_heads=n_kv_heads)
    assert operators >= CPU_KERNELS
    assert "aten::_scaled_dot_product_attention_math" not in operators


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its flash kernels are not checked here")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_cuda_runs_a_flash_kernel_both_ways(lengths: list[int]) -> None:
    operators = attention_operators("cuda", torch.bfloat16, lengths)
    flash = {name for name in operators if "flash" in name or "cudnn" in name or "varlen" in name}
    assert any(name.endswith("backward") for name in flash), operators
    assert "aten::_scaled_dot_product_attention_math" not in operators


def test_grouped_queries_need_no_argument_that_older_torch_lacks() -> None:
    ran = subprocess.run([sys.executable, "-c", OLD_SIGNATURE], capture_output=True, text=True)
    assert ran.stdout == "(8, 4, 16)\n", ran.stderr
