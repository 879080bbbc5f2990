"""Attention by flex_attention: block masks as torch makes them, and what `dense` computes.

Its kernel is for GPUs. On a CPU torch runs the graphs that it traces, forward and backward, with matrices of tokens x
tokens; it refuses gradients there unless the check is out of the way.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from dense_attention import RULES, batch_of, dense
from small_models import packed, random_documents, small_config, small_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from triplane.model import attend, flex
from triplane.model.attend import SegmentAttention
from triplane.model.rule import Rule
from triplane.model.transformer import Transformer
from triplane.parallel.recompute import apply_recompute

HEADS, HEAD_DIM = 6, 16
PACKED, EQUAL = (0, 1, 18, 19, 130, 241, 300), (0, 100, 200, 300)


def lists(mask: BlockMask) -> list[list[list[int]]]:
    """Blocks that each block meets: partial and whole ones, of keys and of queries."""
    counts, indices = tensors(mask)[::2], tensors(mask)[1::2]
    return [[row[:n] for n, row in zip(*(x[0, 0].tolist() for x in pair))] for pair in zip(counts, indices)]


def tensors(mask: BlockMask) -> list[Tensor]:
    found: tuple[Any, ...] = mask.as_tuple()
    return [x for x in found if isinstance(x, Tensor)]


@pytest.mark.parametrize("tokens", [1, 17, 127, 128, 129, 300, 512, 1281])
def test_blocks_are_those_that_torch_finds_in_the_whole_matrix(tokens: int) -> None:
    draw = random.Random(tokens)
    for documents in (1, 2, 3, 6, 10):
        cuts = sorted(draw.sample(range(1, tokens), min(documents, tokens) - 1))
        for window in (None, 1, 7, 128, 200, 400):
            mask = flex.block_mask(flex.lowest(torch.tensor([0, *cuts, tokens], dtype=torch.int32), tokens, window))
            expected = create_block_mask(mask.mask_mod, 1, 1, tokens, tokens, device="cpu")
            assert mask.shape == expected.shape
            assert lists(mask) == lists(expected), (cuts, window)
            assert all(x.dtype == torch.int32 and int(x.max()) <= len(x[0, 0]) for x in tensors(mask))


@pytest.fixture
def on_a_cpu(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(flex._attend, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attend, "choose", lambda *_, **__: "flex")


def output_and_gradients(attention: Any, bounds: Sequence[int], extras: str, kv_heads: int, *args: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    qkv = [normal(bounds[-1], heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    longest = batch_of(bounds).longest
    grad, bias, sinks = normal(bounds[-1], HEADS, HEAD_DIM).detach(), normal(HEADS, longest + 3), normal(HEADS)
    extra = {key: x for key, x in (("bias_HL", bias), ("sinks_H", sinks)) if key[:4] in extras}
    out = attention(*qkv, *args, **extra)
    return [out.detach(), *torch.autograd.grad(out, (*qkv, *extra.values()), grad)]


def difference(bounds: Sequence[int], rule: Rule, extras: str, kv_heads: int = 2) -> float:
    known = (bounds, extras, kv_heads)
    found = output_and_gradients(SegmentAttention(rule), *known, batch_of(bounds))
    expected = output_and_gradients(dense, *known, bounds, rule)
    return max(float((x - y).detach().abs().max()) for x, y in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_cpu")
def test_output_and_gradients() -> None:
    """In one test, since each rule and each of the extras is compiled once."""
    for rule in RULES.values():
        for bounds, extras, kv_heads in [(PACKED, "bias sink", 2), (EQUAL, "bias sink", 3), (PACKED, "", 2)]:
            assert difference(bounds, rule, extras, kv_heads) < 4e-5, (rule, bounds, extras)  # sums of 300 in fp32
    for extras in ("bias", "sink"):
        assert difference(PACKED, RULES["window and soft cap"], extras, HEADS) < 4e-5, extras
    assert difference((0, 17), RULES["window"], "bias sink") < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_cpu")
def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, lowest, scored = Rule(0.3, window=7, softcap=2.0), flex.lowest, flex.scored
    with monkeypatch.context() as patch:
        patch.setattr(flex, "lowest", lambda bounds, tokens, window: lowest(bounds, tokens, window + 1))
        assert difference(EQUAL, rule, "bias") > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(flex, "scored", lambda score, cap, bias: scored(score + bias, cap, None))
        torch._dynamo.reset()
        assert difference(EQUAL, rule, "bias") > 1e-2


class Fixed(nn.Module):
    """A core with a bias that does not learn, and sinks that do."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.core = SegmentAttention(rule)
        self.register_buffer("bias_HL", torch.linspace(-1, 1, HEADS * 64).view(HEADS, 64))
        self.sinks_H = nn.Parameter(torch.linspace(-1, 1, HEADS))

    def forward(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: Any, *_: None) -> Tensor:
        return self.core(q_THK, k_TGK, v_TGK, batch, self.bias_HL, self.sinks_H)


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_hold_the_kernel_and_no_documents_recompile_them(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers with different numbers. Their bias is fixed, since on a CPU torch returns no gradient of what a graph
    computes itself, such as the bias with more distances.
    """
    config = small_config()
    eager, compiled = small_model(config), small_model(config)
    for model in (eager, compiled):
        for block, rule in zip(model.blocks.values(), (Rule(0.3, window=9, softcap=2.0), Rule(0.2, softcap=0.7))):
            block.attention.core = Fixed(rule)
    if recompute:
        apply_recompute(compiled.blocks.values(), "selective")
    for block in compiled.blocks.values():
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]

    def step(model: Transformer, lengths: list[int]) -> tuple[Tensor, ...]:
        loss = model(packed(random_documents(config, lengths))).objective
        return loss, *torch.autograd.grad(loss, [*model.parameters()])

    graphs = []
    for lengths in ([5, 17, 1, 9], [8, 8, 8, 8], [20, 12], [30, 2], [3, 3, 3, 23], [16, 16]):
        found = step(compiled, lengths)
        with monkeypatch.context() as patch:
            patch.setattr(attend, "choose", lambda *_, **__: "blocked")
            torch.testing.assert_close(found, step(eager, lengths), atol=1e-4, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] - graphs[-4] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel itself is not checked here")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("extras", ["", "bias", "sink", "bias sink"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_kernel(rule: Rule, extras: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "choose", lambda *_, **__: "flex")

    def kernel(*args: Any, **extra: Tensor) -> Tensor:
        *qkv, batch = args
        there = [x.to("cuda", torch.bfloat16) for x in qkv]
        extra = {key: x.cuda() for key, x in extra.items()}
        return SegmentAttention(rule)(*there, batch.to(torch.device("cuda")), **extra).float().cpu()

    for bounds in (PACKED, EQUAL, (0, 17), (0, 512)):
        found = output_and_gradients(kernel, bounds, extras, 2, batch_of(bounds))
        expected = output_and_gradients(dense, bounds, extras, 2, bounds, rule)
        for x, y in zip(found, expected, strict=True):
            assert (x - y).norm() < 2e-2 * y.norm()
