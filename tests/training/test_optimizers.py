"""Each kind of optimizer against its definition, on one process."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from triplane.model.weights import Axis, Weight
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Placement
from triplane.parallel.update import Piece, Update
from triplane.training.optimizers.adamw import AdamW
from triplane.training.optimizers.kinds import AnyOptimizer
from triplane.training.optimizers.lion import Lion
from triplane.training.optimizers.muon import Muon
from triplane.training.optimizers.newton_schulz import orthogonal
from triplane.training.optimizers.optimizer import WeightGroup

MATRIX = Weight("blocks.0.attention.wq.weight", (Axis("head", 2, 4), Axis("dim", 6)), "normal", "matrix")
TALL = Weight("blocks.0.feed_forward.w_up.weight", (Axis("hidden", 20), Axis("dim", 6)), "normal", "matrix")
EXPERTS = Weight(
    "blocks.0.feed_forward.w_down.weight", (Axis("expert", 3), Axis("dim", 6), Axis("hidden", 4)), "normal", "matrix"
)
TABLE = Weight("embedding.weight", (Axis("vocab", 5), Axis("dim", 6)), "normal", "table")
VECTOR = Weight("norm.weight", (Axis("dim", 6),), 1.0, "vector")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Mesh:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *args, **kwargs: None)
    return Mesh.of_one(torch.device("cpu"))


def pieces(weights: Sequence[Weight]) -> list[Piece]:
    torch.manual_seed(0)
    made = []
    for weight in weights:
        tensor = nn.Parameter(torch.randn(weight.shape))
        placement = Placement(
            weight=weight,
            parameter=tensor,
            local=tensor.shape,
            offsets=(0,) * tensor.dim(),
            sharded=False,
            primary=True,
            tied_copy=False,
            spread=Mesh.of_one(torch.device("cpu")).spread,
        )
        made.append(Piece(placement, tensor))
    return made


def gradients(made: Sequence[Piece], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [0.01 * torch.randn(piece.weight.shape, generator=generator) for piece in made]


def run(kind: AnyOptimizer, weights: Sequence[Weight], mesh: Mesh, steps: int = 3) -> tuple[list[Tensor], Update]:
    """Returns the weights after some steps of gradients that need no clipping."""
    made = pieces(weights)
    update = Update(kind, made, mesh)
    for step in range(steps):
        for piece, gradient in zip(made, gradients(made, step)):
            piece.weight.grad = gradient
        update.apply(kind.lr)
    return [piece.weight.detach() for piece in made], update


def test_without_gradient_only_matrices_shrink(alone: Mesh) -> None:
    made = pieces([MATRIX, VECTOR])
    before = [piece.weight.detach().clone() for piece in made]
    update = Update(AdamW(lr=0.5, weight_decay=0.1), made, alone)
    for piece in made:
        piece.weight.grad = torch.zeros_like(piece.weight)
    update.apply(0.5)
    torch.testing.assert_close(made[0].weight.detach(), before[0] * (1 - 0.5 * 0.1))
    torch.testing.assert_close(made[1].weight.detach(), before[1])


def test_adam_is_as_configured(alone: Mesh) -> None:
    config = AdamW(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3)
    (optimizer,) = Update(config, pieces([MATRIX]), alone).optimizers
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-3)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest(alone: Mesh, nesterov: bool, scaling: Any) -> None:
    weights = [MATRIX, TALL, TABLE, VECTOR]
    kind = Muon(
        kind="muon", lr=0.02, adamw_lr=0.003, nesterov=nesterov, scaling=scaling, coefficients="classic", grad_clip=1e9
    )
    found, _ = run(kind, weights, alone)

    theirs = pieces(weights)
    matrices, others = [piece.weight for piece in theirs[:2]], [piece.weight for piece in theirs[2:]]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=scaling)
    groups = [{"params": [others[0]], "weight_decay": 0.1}, {"params": [others[1]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.003, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        for piece, gradient in zip(theirs, gradients(theirs, step)):
            piece.weight.grad = gradient
        muon.step()
        adamw.step()
    for mine, piece in zip(found[:2], theirs[:2]):
        # torch normalises in bf16 and then rounds a product less.
        torch.testing.assert_close(mine, piece.weight.detach(), rtol=0.0, atol=2e-3)
    for mine, piece in zip(found[2:], theirs[2:]):
        torch.testing.assert_close(mine, piece.weight.detach())


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("weight", [MATRIX, TALL, EXPERTS], ids=lambda weight: weight.name)
def test_muon_counts_the_flops_that_it_takes(weight: Weight, by_head: bool) -> None:
    kind = Muon(kind="muon", by_head=by_head, iterations=4)
    with FlopCounterMode(display=False) as counter:
        kind.orthogonal(weight, torch.randn(weight.shape))
    assert kind.update_flops(weight) == counter.get_total_flops() > 0
    assert kind.update_flops(TABLE) == 0


def test_muon_by_head_orthogonalises_each_head(alone: Mesh) -> None:
    kind = Muon(kind="muon", by_head=True, iterate_in="fp32", iterations=10)
    step = kind.orthogonal(MATRIX, torch.randn(8, 6)) / (0.2 * 6**0.5)
    for head in step.view(2, 4, 6):
        torch.testing.assert_close(head @ head.T, torch.eye(4), rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (128, 48), (3, 20, 50)])
@pytest.mark.parametrize(("coefficients", "error"), [("classic", 0.35), ("polar_express", 0.15)])
def test_five_iterations_come_near_to_the_orthogonal_factor(
    shape: tuple[int, ...], coefficients: Any, error: float
) -> None:
    torch.manual_seed(0)
    u, values, v = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    singular = torch.linalg.svdvals(orthogonal(u @ torch.diag_embed(values.clamp(min=1.0)) @ v, coefficients, 5))
    assert (singular - 1).abs().max() < error


def test_normuon_divides_each_row_by_its_second_moment_and_keeps_the_length(alone: Mesh) -> None:
    kind = Muon(kind="muon", lr=0.02, second_moment_decay=0.8, iterate_in="fp32", grad_clip=1e9)
    found, update = run(kind, [MATRIX, TALL, EXPERTS], alone)
    plain = pieces([MATRIX, TALL, EXPERTS])
    matrices = [matrix for piece in plain for matrix in piece.weight.detach().view(-1, *piece.weight.shape[-2:])]
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    seconds = [torch.zeros(len(matrix)) for matrix in matrices]
    for step in range(3):
        parts = [grad.view(-1, *grad.shape[-2:]) for grad in gradients(plain, step)]
        for matrix, momentum, second, grad in zip(matrices, momenta, seconds, [one for part in parts for one in part]):
            momentum.mul_(0.95).add_(0.05 * grad)
            factor = orthogonal(0.95 * momentum + 0.05 * grad, "polar_express", 5) * 0.2 * max(matrix.shape) ** 0.5
            for number, row in enumerate(factor):
                second[number] = 0.8 * second[number] + 0.2 * row.square().mean()
            even = torch.stack([row / root for row, root in zip(factor, second.sqrt())])
            matrix.mul_(1 - 0.02 * 0.1).sub_(0.02 * even * factor.norm() / even.norm())
    for mine, piece in zip(found, plain):
        torch.testing.assert_close(mine, piece.weight.detach())
    kept = {fragment.key: fragment for fragment in update.fragments()}
    values = torch.cat([kept[f"second_moment/{piece.placement.name}"].data.flatten() for piece in plain])
    torch.testing.assert_close(values, torch.cat(seconds))
    assert kept[f"second_moment/{EXPERTS.name}"].shape == (3, 6)


def test_lion_steps_by_signs(alone: Mesh) -> None:
    kind = Lion(kind="lion", lr=0.01, beta1=0.9, beta2=0.98, grad_clip=1e9)
    found, _ = run(kind, [MATRIX, VECTOR], alone)
    plain = pieces([MATRIX, VECTOR])
    moments = [torch.zeros_like(piece.weight) for piece in plain]
    for step in range(3):
        for piece, moment, gradient in zip(plain, moments, gradients(plain, step)):
            decay = 0.1 if piece.placement.role == "matrix" else 0.0
            direction = (0.9 * moment + 0.1 * gradient).sign()
            with torch.no_grad():
                piece.weight.sub_(0.01 * (direction + decay * piece.weight))
                moment.copy_(0.98 * moment + 0.02 * gradient)
    for mine, piece in zip(found, plain):
        torch.testing.assert_close(mine, piece.weight.detach())


def test_the_average_begins_with_the_first_weights_and_soon_forgets_them(alone: Mesh) -> None:
    made = pieces([MATRIX, VECTOR])
    update = Update(AdamW(lr=0.1, average_decay=0.4), made, alone)
    expected: list[Tensor] = []
    for step in range(1, 9):
        for piece, gradient in zip(made, gradients(made, step)):
            piece.weight.grad = gradient
        update.apply(0.1)
        weights = [piece.weight.detach().clone() for piece in made]
        decay = [0, 1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 0.4][step - 1]
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected or weights, weights)]
    found = [fragment.data for fragment in update.fragments() if fragment.kind == "average"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "kind", [AdamW(average_decay=0.9), Lion(kind="lion"), Muon(kind="muon"), Muon(kind="muon", second_moment_decay=0.9)]
)
def test_a_gradient_that_is_not_finite_changes_nothing(alone: Mesh, kind: AnyOptimizer) -> None:
    before, update = run(kind, [MATRIX, VECTOR], alone)
    kept = [tensor.clone() for tensor in before]
    state = [fragment.data.clone() for fragment in update.fragments()]
    for piece in update.pieces:
        piece.weight.grad = torch.ones_like(piece.weight)
    assert isinstance(update.pieces[0].weight.grad, Tensor)
    update.pieces[0].weight.grad[0, 0] = float("nan")
    assert not update.apply(kind.lr).isfinite()
    for tensor, before_ in zip(before, kept):
        assert torch.equal(tensor, before_)
    for fragment, before_ in zip(update.fragments(), state):
        assert torch.equal(fragment.data, before_), fragment.key


@pytest.mark.parametrize("kind", [AdamW(grad_clip=1e-3), Muon(kind="muon", grad_clip=1e-3, iterate_in="fp32")])
def test_clipping_scales_the_gradient_not_the_update(alone: Mesh, kind: AnyOptimizer) -> None:
    clipped, _ = run(kind, [MATRIX], alone, steps=1)
    free, _ = run(kind.model_copy(update={"grad_clip": 1e9}), [MATRIX], alone, steps=1)
    torch.testing.assert_close(clipped, free, rtol=0.0, atol=2e-4)  # both forget the gradient's length


def test_groups_scale_rates_and_decays_and_freeze(alone: Mesh) -> None:
    groups = [
        WeightGroup(weights="vector", lr_scale=0.0),
        WeightGroup(weights="blocks.*.wq.*", lr_scale=0.5, weight_decay=0.0),
        WeightGroup(weights="embedding.weight", weight_decay=0.3),
    ]
    update = Update(AdamW(groups=groups), pieces([MATRIX, TALL, TABLE, VECTOR]), alone)
    (optimizer,) = update.optimizers
    found = {(group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {(0.5, 0.0), (1.0, 0.1), (1.0, 0.3), (0.0, 0.0)}
    before = update.pieces[3].weight.detach().clone()
    for piece in update.pieces:
        piece.weight.grad = torch.ones_like(piece.weight)
    update.apply(0.1)
    assert torch.equal(update.pieces[3].weight.detach(), before)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05, 0.1, 0.0}


def test_a_group_that_no_weight_is_in_is_refused_with_the_nearest_name() -> None:
    kind = AdamW(groups=[WeightGroup(weights="embeding.weight")])
    assert list(kind.problems([MATRIX, TABLE, VECTOR])) == [
        "optimizer.groups.0: no weight is named 'embeding.weight'; the nearest is 'embedding.weight'"
    ]


def test_muon_without_matrices_is_refused() -> None:
    assert list(Muon(kind="muon").problems([TABLE, VECTOR])) == [
        'optimizer.kind "muon" updates the matrices of blocks, and this network has none; use "adamw"'
    ]
