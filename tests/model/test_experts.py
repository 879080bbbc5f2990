"""Sparse experts against loops over tokens and experts in fp64: outputs, gradients, added losses, what is counted."""

from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triplane.model.batch import Batch
from triplane.model.grouped import grouped_product
from triplane.model.modules import PartModule
from triplane.model.parts.balance import SequenceLoss
from triplane.model.parts.experts import Experts

DIM, TOKENS, SEQUENCES = 12, 20, 2
SIZES: dict[str, Any] = {"n_experts": 6, "active": 2, "hidden_dim": 8}
LOSS = {"kind": "loss", "weight": 0.3}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "scores as weights": {"normalise": False, "routed_scale": 2.5},
    "one expert each": {"active": 1, "normalise": False},
    "shared": {"shared": 2, "activation": "gelu"},
    "shared, weighed": {"shared": 1, "shared_gate": True},
    "groups": {"router": "sigmoid", "groups": 3, "active_groups": 2, "active": 3, "routed_scale": 1.5},
    "groups by their best": {"groups": 2, "active_groups": 1, "group_best": 1, "normalise": False},
    "biases": {"bias": True, "router_bias": True, "clamp": 0.5, "up_offset": 1.0, "activation": "gelu_sigmoid"},
    "odd widths": {"hidden_dim": 5},
    "balanced": {"balance": LOSS, "z_loss_weight": 0.1},
    "balanced sigmoid": {"balance": LOSS, "router": "sigmoid"},
    "balanced by a bias": {"balance": {"kind": "bias"}, "router": "sigmoid", "groups": 3, "active_groups": 2},
}


def built(options: dict[str, Any]) -> tuple[PartModule, dict[str, Tensor], Tensor, Batch]:
    """Returns a module, its weights in fp64, its input, and a batch of two sequences, in training."""
    module = Experts(**SIZES | options).build(DIM)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.7, generator=generator)
    weights = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    module.tally = torch.zeros(module.config.tallied, requires_grad=True)  # type: ignore[attr-defined]
    ids_T = torch.zeros(TOKENS, dtype=torch.int64)
    batch = replace(Batch.build(ids_T, ids_T, (0, 3, TOKENS), sequences=SEQUENCES), scale=0.25)
    return module, weights, torch.randn(TOKENS, DIM, generator=generator), batch


def by_hand(part: Experts, w: dict[str, Tensor], x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """Returns the output, the sum of added losses over tokens, that of entropies, and each token's experts."""

    def gated(x: Tensor, prefix: str, expert: int | None) -> Tensor:
        def linear(name: str, x: Tensor) -> Tensor:
            layer = {leaf: w[f"{prefix}{name}.{leaf}"] for leaf in ("weight", "bias") if f"{prefix}{name}.{leaf}" in w}
            own = {leaf: tensor if expert is None else tensor[expert] for leaf, tensor in layer.items()}
            return own["weight"] @ x + own.get("bias", 0)

        gate, up = linear("w_gate", x), linear("w_up", x)
        if part.clamp is not None:
            gate, up = gate.clamp(max=part.clamp), up.clamp(-part.clamp, part.clamp)
        act = {
            "silu": lambda g: g * g.sigmoid(),
            "gelu": lambda g: g * (1 + torch.erf(g / 2**0.5)) / 2,
            "gelu_sigmoid": lambda g: g * (1.702 * g).sigmoid(),
        }[part.activation]
        return linear("w_down", act(gate) * (up + part.up_offset))

    outputs, logits, shares, selected = [], [], [], []
    for x in x_TD:
        logit = w["router.weight"] @ x + w.get("router.bias", 0)
        score = logit.exp() / logit.exp().sum() if part.router == "softmax" else logit.sigmoid()
        ranked = (score + w.get("router.selection_bias", 0)).tolist()
        if part.groups > 1:
            size = part.n_experts // part.groups
            groups = [sorted(ranked[start : start + size]) for start in range(0, part.n_experts, size)]
            worth = [sum(group[-part.group_best :]) for group in groups]
            best = sorted(range(part.groups), key=lambda g: -worth[g])[: part.active_groups]
            ranked = [r if e // size in best else -inf for e, r in enumerate(ranked)]
        chosen = sorted(range(part.n_experts), key=lambda e: -ranked[e])[: part.active]
        total = score[chosen].sum() if part.normalise else 1.0
        out = sum(part.routed_scale * score[e] / total * gated(x, "", e) for e in chosen)
        if part.shared:
            weight = (w["always.weigh.weight"] @ x).sigmoid() if part.shared_gate else 1.0
            out = out + weight * gated(x, "always.", None)
        outputs.append(out)
        logits.append(logit)
        shares.append(score / score.sum())
        selected.append(chosen)
    share_TE, losses = torch.stack(shares), torch.zeros((), dtype=torch.float64)
    if isinstance(part.balance, SequenceLoss):
        seq_len = TOKENS // SEQUENCES
        for start in range(0, TOKENS, seq_len):
            of_sequence = [e for chosen in selected[start : start + seq_len] for e in chosen]
            for e in range(part.n_experts):
                frequency = part.n_experts / (part.active * seq_len) * of_sequence.count(e)
                losses = losses + part.balance.weight * frequency * share_TE[start : start + seq_len, e].sum()
    losses = losses + part.z_loss_weight * sum(logit.exp().sum().log() ** 2 for logit in logits)
    return torch.stack(outputs), losses, -(share_TE * share_TE.log()).sum(), selected


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_experts_equal_a_loop(name: str, recomputed: bool) -> None:
    module, weights, x_TD, batch = built(OPTIONS[name])
    part = module.config
    assert isinstance(part, Experts) and module.tally is not None
    x_TD.requires_grad_()
    exact_TD = x_TD.detach().double().requires_grad_()
    expected, losses, entropy, selected = by_hand(part, weights, exact_TD)
    out_TD = checkpoint(module, x_TD, batch, use_reentrant=False) if recomputed else module(x_TD, batch)
    torch.testing.assert_close(out_TD.double(), expected, atol=1e-5, rtol=1e-5)
    slope_TD = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2))
    (out_TD * slope_TD).sum().backward()
    ((expected * slope_TD).sum() + 0.25 * losses).backward()  # 0.25 is the batch's scale
    trained = {name: p for name, p in module.named_parameters() if not name.endswith("selection_bias")}
    for ours, theirs in [(x_TD, exact_TD), *((p, weights[name]) for name, p in trained.items())]:
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=2e-5, rtol=2e-5)
    assert module.tally.grad is not None
    counted = [sum(e in chosen for chosen in selected) for e in range(part.n_experts)]
    torch.testing.assert_close(module.tally.grad[2:].tolist(), [float(count) for count in counted])
    torch.testing.assert_close(
        module.tally.grad[:2].double(), torch.stack((losses, entropy)).detach(), atol=1e-5, rtol=1e-5
    )


def test_a_selection_bias_follows_the_loads() -> None:
    module, *_ = built({"balance": {"kind": "bias", "rate": 0.5}})
    part, bias_E = module.config, module.router.selection_bias
    assert isinstance(part, Experts) and not bias_E.requires_grad
    before_E, counts = bias_E.clone(), torch.tensor([9.0, 9.0, 1.0, 2, 3, 2, 2, 2], dtype=torch.float64)
    part.after_step(module, counts, torch.tensor(True))
    torch.testing.assert_close(bias_E - before_E, torch.tensor([0.5, 0, -0.5, 0, 0, 0]))
    part.after_step(module, counts, torch.tensor(False))
    torch.testing.assert_close(bias_E - before_E, torch.tensor([0.5, 0, -0.5, 0, 0, 0]))


def test_without_training_nothing_is_added_or_counted() -> None:
    module, weights, x_TD, batch = built({"balance": LOSS})
    part = module.config
    assert isinstance(part, Experts) and module.tally is not None
    out_TD = module(x_TD, replace(batch, scale=None))
    out_TD.sum().backward()
    by_hand(part, weights, x_TD.double())[0].sum().backward()
    torch.testing.assert_close(module.router.weight.grad.double(), weights["router.weight"].grad, atol=2e-5, rtol=2e-5)
    assert module.tally.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("widths", [(16, 24), (6, 10)])
def test_grouped_products_with_empty_groups(widths: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_SD = torch.randn(9, widths[0], generator=generator).to(dtype).requires_grad_()
    weight_EFD = torch.randn(4, *widths[::-1], generator=generator).to(dtype).requires_grad_()
    ends_E = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    out_SF = grouped_product(x_SD, weight_EFD, ends_E)
    expected = torch.cat((x_SD[:4] @ weight_EFD[1].T, x_SD[4:] @ weight_EFD[3].T))
    torch.testing.assert_close(out_SF, expected)
    slope_SF = torch.ones(1, dtype=dtype).expand_as(expected)  # as the gradient of a sum, it has no rows of its own
    for ours, theirs in zip(
        torch.autograd.grad(out_SF, (x_SD, weight_EFD), slope_SF),
        torch.autograd.grad(expected, (x_SD, weight_EFD), slope_SF),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"active": 7}, "active (7) is over n_experts (6)"),
        (
            {"shared_gate": True},
            "shared_gate requires shared experts without bias, but shared is 0, bias False",
        ),
        ({"groups": 4}, "n_experts (6) is not a multiple of groups (4); the next multiple is 8"),
        ({"groups": 6}, "group_best (2) is over n_experts (6) / groups (6)"),
        ({"groups": 3, "active_groups": 4}, "active_groups (4) is over groups (3)"),
        ({"groups": 3, "active": 3}, "active (3) is over n_experts (6) / groups (3) x active_groups (1)"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], problem: str) -> None:
    assert list(Experts(**SIZES | options).problems()) == [problem]
