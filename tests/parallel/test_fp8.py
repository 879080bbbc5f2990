"""fp8 behind its flag: near the same under every layout, near fp32; every share of a weight is multiplied in it."""

from functools import partial
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx  # imported before the ranks fork
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from triplane.model.config import ModelConfig
from triplane.model.fp8 import product
from triplane.model.modules import Linear
from triplane.model.parts.gated import Gated
from triplane.model.parts.softmax import Softmax
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.tensor import SharedLinear
from triplane.prove.forked import run_ranks
from triplane.prove.networks import network
from triplane.prove.reference import SEQUENCES, Trace, proof_engine, proof_model, train_on_mesh, train_plainly

STEPS = 3
HEADS: dict[str, Any] = {"n_heads": 4, "head_dim": 16, "qkv_bias": True, "output_bias": True}
DENSE = proof_model().model_copy(
    update={"attention": Softmax(n_kv_heads=2, **HEADS), "feed_forward": Gated(hidden_dim=64)}
)
MODELS = {
    "dense": DENSE,
    "one key head": DENSE.model_copy(update={"attention": Softmax(n_kv_heads=1, **HEADS)}),
    "experts": network(DENSE, ("experts after a dense layer",)),
}
LAYERS = {"dense": 5 * 7, "one key head": 5 * 7, "experts": 5 * 4 + 3 + 4 * 3}
"""Linear layers: those of attention, dense layers and shared experts."""


class _Products(TorchDispatchMode):
    """Counts the products in fp8."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._scaled_mm.default
        return func(*args, **kwargs or {})


def _train(mesh: Mesh, model: ModelConfig, layout: ParallelConfig) -> tuple[Trace, int]:
    """Returns the trace, and how often the rank has multiplied in fp8."""
    with _Products() as products:
        return train_on_mesh(proof_engine(mesh, model, layout, dtype=torch.bfloat16), range(STEPS)), products.count


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Trace]:
    layout = ParallelConfig(fp8=True)
    return {name: run_ranks(layout, 1, _train, model, layout)[0][0] for name, model in MODELS.items()}


def _assert_near(trace: Trace, reference: Trace, loss: float) -> None:
    steps = len(trace.losses)
    assert trace.losses == pytest.approx(reference.losses[:steps], abs=loss)
    assert trace.norms == pytest.approx(reference.norms[:steps], rel=0.05)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"dp": 2, "zero": 3}),
    ("dense", {"pp": 2}),
    ("dense", {"dp": 2, "recompute": "full"}),
    ("dense", {"tp": 2}),
    ("dense", {"tp": 2, "sequence_parallel": True, "recompute": "selective"}),
    ("dense", {"tp": 2, "pp": 2, "recompute": "full"}),
    ("dense", {"tp": 2, "cp": 2, "zero": 0}),
    ("one key head", {"tp": 2, "dp": 2, "zero": 3}),
    ("experts", {"dp": 2, "ep": 2}),
    ("experts", {"tp": 2, "sequence_parallel": True, "dp": 2, "ep": 2}),
]


@pytest.mark.parametrize(("model", "axes"), CASES, ids=str)
def test_layouts_multiply_alike(model: str, axes: dict[str, Any], one_rank: dict[str, Trace]) -> None:
    """Under tp each share has a scale of its own, which moves the loss about as far as it is from fp32."""
    layout = ParallelConfig(**{"dp": 1} | axes, fp8=True)
    assert isinstance(layout.dp, int)
    ranks = layout.ranks_of_one * layout.dp
    traces, products = zip(*run_ranks(layout, ranks, _train, MODELS[model], layout))
    for trace in traces:
        _assert_near(trace, one_rank[model], 1e-2 if layout.tp > 1 else 2e-3)
    passes = 4 if layout.recompute == "full" else 3
    micro_batches = STEPS * SEQUENCES // layout.dp // 2
    assert sum(products) == LAYERS[model] * passes * micro_batches * ranks // layout.pp


def _compiled(mesh: Mesh, model: ModelConfig, layout: ParallelConfig) -> tuple[Trace, int, int]:
    """Returns the trace, the graphs that were compiled, and reasons why one ended before its block did."""
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    with torch._dynamo.config.patch(disable=False):
        trace = train_on_mesh(proof_engine(mesh, model, layout, dtype=torch.bfloat16), range(1))
    return trace, counters["stats"]["unique_graphs"], len(counters["graph_break"])


def test_compiled_shares_multiply_alike(one_rank: dict[str, Trace]) -> None:
    keys: dict[str, Any] = {"sequence_parallel": True, "compile": True, "recompute": "selective"}
    layout = ParallelConfig(tp=2, dp=1, fp8=True, **keys)
    for trace, graphs, breaks in run_ranks(layout, 2, _compiled, DENSE, layout):
        assert graphs and not breaks
        _assert_near(trace, one_rank["dense"], 1e-2)


def test_it_follows_fp32_but_is_not_fp32(one_rank: dict[str, Trace]) -> None:
    exact = train_plainly(DENSE, STEPS)
    assert one_rank["dense"].losses == pytest.approx(exact.losses, abs=2e-2)
    assert run_ranks(ParallelConfig(), 1, _train, DENSE, ParallelConfig())[0][0].losses != one_rank["dense"].losses


def _shares(mesh: Mesh, kind: str, x_TD: Tensor, weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output of a rank's layer, and the gradient of its weight from the output's square."""
    plain, rank = Linear(weight_FD.shape[1], weight_FD.shape[0], bias=False, dtype=weight_FD.dtype), mesh.tp.rank
    layer: Any = {
        "column": lambda: megatron.ColumnParallelLinear(plain, mesh),
        "row": lambda: megatron.RowParallelLinear(plain, mesh, sequence_parallel=False),
        "shared": lambda: SharedLinear(plain, slice(16 * rank, 16 * rank + 16), mesh),
    }[kind]()
    layer.product = product
    layer.weight.data.copy_(
        {"column": weight_FD.chunk(2)[rank], "row": weight_FD.chunk(2, 1)[rank]}.get(kind, weight_FD)
    )
    out_TF = layer(x_TD.chunk(2, 1)[rank].contiguous() if kind == "row" else x_TD)
    out_TF.square().sum().backward()
    return out_TF.detach(), layer.weight.grad


@pytest.mark.parametrize("kind", ["column", "row", "shared"])
def test_each_share_has_its_own_scale(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD, weight_FD = (torch.randn(32, 64, generator=generator).bfloat16() for _ in range(2))
    weight_FD[16:] *= 3
    weight_FD[:, 32:] *= 5
    x_TD[:, :32] *= 7
    found = run_ranks(ParallelConfig(tp=2), 2, _shares, kind, x_TD, weight_FD)
    shares = [weight.clone().requires_grad_() for weight in weight_FD.chunk(2, 1 if kind == "row" else 0)]
    inputs = x_TD.chunk(2, 1) if kind == "row" else (x_TD, x_TD)
    outs = [product(x.contiguous(), share) for x, share in zip(inputs, shares)]
    if kind == "row":
        outs = [outs[0] + outs[1]] * 2
    gradients = [
        torch.autograd.grad(out.square().sum(), share, retain_graph=True)[0] for out, share in zip(outs, shares)
    ]
    if kind == "shared":
        gradients = [torch.cat(gradients)] * 2
    for (out, gradient), expected, share in zip(found, outs, gradients):
        assert out.equal(expected)
        assert gradient.equal(share)
