"""Attention is what `dense` computes with matrices, for each rule: its output and all gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from dense_attention import PLAIN, RULES, batch_of, dense
from small_models import packed, random_documents, small_config, small_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from triplane.model import blocked, documents, fused, sinks, tiles
from triplane.model.attend import Kernel, SegmentAttention, choose
from triplane.model.batch import Batch
from triplane.model.compiled import compile_blocks
from triplane.model.documents import attend_documents
from triplane.model.rule import Rule

HEADS, HEAD_DIM = 6, 8
BOUNDS = {
    "1": (0, 1),
    "17": (0, 17),
    "300": (0, 300),
    "equal": (0, 100, 200, 300),
    "packed": (0, 1, 18, 19, 130, 241, 300),
}


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_KEYS", 90)


class Inputs:
    def __init__(self, tokens: int, longest: int, kv_heads: int = 2, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        self.qkv = [normal(tokens, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
        self.grad = normal(tokens, HEADS, HEAD_DIM).detach()
        self.bias = normal(HEADS, longest + 3)
        self.sinks = normal(HEADS)


def output_and_gradients(attention: Callable[..., Tensor], inputs: Inputs, extras: str, *args: Any) -> list[Tensor]:
    named = {"bias": {"bias_HL": inputs.bias}, "sinks": {"sinks_H": inputs.sinks}}
    extra = {key: value for name in extras.split() for key, value in named[name].items()}
    out = attention(*inputs.qkv, *args, **extra)
    return [out.detach(), *torch.autograd.grad(out, (*inputs.qkv, *extra.values()), inputs.grad)]


def difference(bounds: Sequence[int], rule: Rule, extras: str, **changes: Any) -> float:
    batch = batch_of(bounds)
    inputs = Inputs(bounds[-1], batch.longest, **changes)
    found = output_and_gradients(SegmentAttention(rule), inputs, extras, batch)
    expected = output_and_gradients(dense, inputs, extras, bounds, rule)
    return max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("extras", ["", "bias", "sinks", "bias sinks"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
def test_output_and_gradients(bounds: tuple[int, ...], rule: Rule, extras: str) -> None:
    assert difference(bounds, rule, extras) < 2e-13


@pytest.mark.parametrize("kv_heads", [1, 3, HEADS])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_any_number_of_key_heads(rule: Rule, kv_heads: int) -> None:
    assert difference(BOUNDS["packed"], rule, "bias sinks", kv_heads=kv_heads) < 2e-13


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_fp32(rule: Rule) -> None:
    assert difference(BOUNDS["packed"], rule, "bias sinks", dtype=torch.float32) < 2e-4


def test_many_runs_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_SCORES", 3 * 90 * 100 * 2)
    assert (
        len(blocked.split(tiles.spans_within(range(0, 501, 100)), 2, torch.zeros(500, HEADS, 8), blocked._SCORES)) == 6
    )
    assert difference(range(0, 501, 100), Rule(0.3, window=7), "bias sinks") < 2e-13


def test_parts_on_two_threads_are_those_on_one() -> None:
    rule, bounds = Rule(0.3, window=7), BOUNDS["packed"]
    inputs, batch = Inputs(300, 111), batch_of(bounds)
    one = output_and_gradients(SegmentAttention(rule), inputs, "bias sinks", batch)
    torch.set_num_threads(2)
    try:
        two = output_and_gradients(SegmentAttention(rule), inputs, "bias sinks", batch)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert max(float((x - y).abs().max()) for x, y in zip(one, two, strict=True)) < 1e-13


@pytest.mark.parametrize("distance", [-30, 0, 5, 200, 500])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_span_has_the_distance_it_is_told(rule: Rule, distance: int) -> None:
    """Queries 0 to 99 of a stream are compared with keys 0 to 79, as if they stood `distance` later."""
    inputs = Inputs(100, 700)
    q, k, v = (x.detach() for x in inputs.qkv)
    span = tiles.Span(slice(0, 100), slice(0, 80), distance)
    out, lse = blocked.forward(q, k[:80], v[:80], [span], rule, inputs.bias.detach())
    places = torch.arange(100)[:, None] + distance - torch.arange(80)
    hidden = (places < 0) | (places >= (rule.window or 10**9))
    scores = torch.einsum("tgrk,sgk->grts", q.unflatten(1, (2, -1)), k[:80]).flatten(0, 1) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * (scores / rule.softcap).tanh()
    scores = (scores + inputs.bias.detach()[:, places.clamp(0, 702)]).masked_fill(hidden, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    expected = torch.einsum("hts,shk->thk", scores.softmax(-1).nan_to_num(), v[:80].repeat_interleave(3, dim=1))
    torch.testing.assert_close(out, expected)


@pytest.fixture
def _plain_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_compiled", lambda: (fused._attend, fused._differentiate))


def fused_difference(bounds: Sequence[int], rule: Rule) -> float:
    inputs, longest = Inputs(bounds[-1], 0), batch_of(bounds).longest
    numbers = (torch.tensor(bounds, dtype=torch.int32), longest, "fused", rule.scale, rule.window, None)
    found = output_and_gradients(lambda *qkv: attend_documents(*qkv, None, None, *numbers)[0], inputs, "")
    expected = output_and_gradients(dense, inputs, "", bounds, rule)
    return max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True))


@pytest.mark.usefixtures("_plain_tiles")
@pytest.mark.parametrize("window", [None, 1, 7, 95, 1000])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
def test_tiles_of_compiled_blocks(bounds: tuple[int, ...], window: int | None) -> None:
    assert fused_difference(bounds, Rule(0.3, window=window)) < 2e-13


@pytest.mark.usefixtures("_plain_tiles")
def test_a_bug_in_tiles_of_compiled_blocks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    places = fused._places
    monkeypatch.setattr(fused, "_places", lambda *known: places(*known) + 1)
    assert fused_difference((0, 100), Rule(0.3)) > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_blocks_in_bf16_attend_by_compiled_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients are as near to those in fp32 as the eager block's."""
    config = small_config()
    batch = packed(random_documents(config, [16, 16]))
    exact = small_model(config)
    states = {name: tensor.bfloat16() for name, tensor in exact.state_dict().items()}
    errors, calls = [], []
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", lambda *known: calls.append(1) or forward(*known))
    for compiled in (False, True):
        model = small_model(config).bfloat16()
        model.load_state_dict(states)
        if compiled:
            compile_blocks(model)
        assert not calls
        found = torch.autograd.grad(model(batch).objective, [*model.parameters()])
        expected = torch.autograd.grad(exact(batch).objective, [*exact.parameters()])
        errors.append(max(float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)))
    assert len(calls) == config.n_layers
    assert errors[1] < 1.5 * errors[0] < 0.1


def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Puts one bug after another in place; yields its name."""
    real, add_diagonals, gradient = Rule, blocked.add_diagonals, sinks.gradient
    with monkeypatch.context() as patch:
        patch.setattr(blocked, "edges", lambda tile, window: ())
        yield "no mask"
    with monkeypatch.context() as patch:
        patch.setattr(documents, "Rule", lambda scale, window, softcap: real(scale, window + 1, softcap))
        yield "one key too many in a window"
    with monkeypatch.context() as patch:
        patch.setattr(sinks, "gradient", lambda *known: torch.zeros_like(gradient(*known)))
        yield "no gradient of the sinks"
    with monkeypatch.context() as patch:
        patch.setattr(blocked, "add_diagonals", lambda bias, *rest: add_diagonals(bias.roll(1, dims=1), *rest))
        yield "no gradient of the bias"


def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for bug in planted(monkeypatch):
        found = max(difference((0, 100), Rule(0.3, window=7), extras) for extras in ("", "bias sinks"))
        assert found > 1e-2, bug


@pytest.mark.parametrize(
    ("device", "dtype", "rule", "uniform", "extras", "kernel"),
    [
        ("cpu", torch.float32, PLAIN, True, "", "sdpa"),
        ("cpu", torch.float32, PLAIN, False, "", "flash"),
        ("cpu", torch.float32, PLAIN, True, "sinks", "flash"),
        ("cpu", torch.float32, PLAIN, True, "bias", "blocked"),
        ("cpu", torch.float32, RULES["window"], True, "", "blocked"),
        ("cpu", torch.float32, RULES["soft cap"], True, "", "blocked"),
        ("cuda", torch.bfloat16, PLAIN, True, "", "sdpa"),
        ("cuda", torch.bfloat16, PLAIN, False, "", "varlen"),
        ("cuda", torch.bfloat16, RULES["window"], True, "", "varlen"),
        ("cuda", torch.bfloat16, RULES["window"], True, "sinks", "flash"),
        ("cuda", torch.float32, PLAIN, False, "", "sdpa"),
        ("cuda", torch.float32, PLAIN, True, "sinks", "blocked"),
        ("cuda", torch.float32, RULES["window"], True, "", "blocked"),
        ("cuda", torch.bfloat16, PLAIN, True, "bias", "flex"),
        ("cuda", torch.float16, RULES["window and soft cap"], False, "sinks", "flex"),
        ("cuda", torch.float32, PLAIN, True, "bias", "blocked"),
        ("cuda", torch.float64, RULES["soft cap"], True, "", "blocked"),
    ],
)
def test_which_kernel(device: str, dtype: torch.dtype, rule: Rule, uniform: bool, extras: str, kernel: Kernel) -> None:
    bias, sink = (torch.zeros(1) if name in extras else None for name in ("bias", "sinks"))
    assert choose(device, dtype, 64, rule, uniform=uniform, short=True, bias=bias, sinks=sink) == kernel


@pytest.mark.parametrize(("head_dim", "kernel"), [(8, "blocked"), (16, "flex"), (96, "flex"), (512, "blocked")])
def test_the_kernel_of_soft_caps_has_limits(head_dim: int, kernel: Kernel) -> None:
    known = ("cuda", torch.bfloat16, head_dim, RULES["soft cap"])
    assert choose(*known, uniform=True, short=True, bias=None, sinks=None) == kernel


@pytest.mark.parametrize(("learns", "kernel"), [(True, "blocked"), (False, "flex")])
def test_a_bias_learns_the_same_twice_where_torch_has_to(learns: bool, kernel: Kernel) -> None:
    bias = torch.zeros(1, 1, requires_grad=learns)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose("cuda", torch.bfloat16, 64, PLAIN, uniform=True, short=True, bias=bias, sinks=None) == kernel
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_window_as_long_as_the_segments_is_none() -> None:
    inputs, batch = Inputs(300, 300, dtype=torch.float32), batch_of((0, 300))
    wide, none = (output_and_gradients(SegmentAttention(Rule(0.3, window=w)), inputs, "", batch) for w in (300, None))
    assert all(torch.equal(x, y) for x, y in zip(wide, none, strict=True))


class WithExtras(nn.Module):
    """A core with a bias and sinks to learn."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.core = SegmentAttention(rule)
        self.bias_HL = nn.Parameter(torch.linspace(-1, 1, HEADS * 64).view(HEADS, 64))
        self.sinks_H = nn.Parameter(torch.linspace(-1, 1, HEADS))

    def forward(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: Batch, *_: None) -> Tensor:
        return self.core(q_THK, k_TGK, v_TGK, batch, self.bias_HL, self.sinks_H)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_block_learns_as_an_eager_one() -> None:
    config = small_config()
    eager, compiled = small_model(config), small_model(config)
    for model in (eager, compiled):
        for block in model.blocks.values():
            block.attention.core = WithExtras(Rule(0.3, window=9, softcap=2.0))
    compile_blocks(compiled)
    before = counters["stats"]["unique_graphs"]
    for lengths in ([5, 17, 1, 9], [8, 8, 8, 8], [20, 12], [30, 2], [16, 16]):
        batch = packed(random_documents(config, lengths))
        losses = [model(batch).objective for model in (eager, compiled)]
        gradients = [torch.autograd.grad(loss, [*model.parameters()]) for loss, model in zip(losses, (eager, compiled))]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] - before <= 4  # three of blocks, one of the loss
