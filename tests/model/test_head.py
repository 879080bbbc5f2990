"""The chunked head against the formulas of cross-entropy and z-loss on whole logits."""

import pytest
import torch
from small_models import small_config
from torch import Tensor

from triplane.model import head as head_module
from triplane.model.batch import IGNORED_TARGET
from triplane.model.head import Head

TARGETS_T = torch.tensor([3, IGNORED_TARGET, 0, 10, IGNORED_TARGET, 5, 5])


def small_head(z_loss_weight: float) -> Head:
    head = Head(small_config(vocab_size=11, dim=6, z_loss_weight=z_loss_weight))
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    return head


@pytest.fixture(name="x_TD")
def hidden() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


def plain(x_TD: Tensor, weight_VD: Tensor, z_loss_weight: float) -> tuple[Tensor, Tensor]:
    """The sums by definition, in fp64, over the rows that have a target."""
    kept = TARGETS_T != IGNORED_TARGET
    rows = (x_TD.double() @ weight_VD.double().T)[kept]
    partition = rows.exp().sum(dim=-1).log()
    chosen = rows[torch.arange(len(rows)), TARGETS_T[kept]]
    return (partition - chosen).sum(), z_loss_weight * partition.square().sum()


@pytest.mark.parametrize("weight", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("compiled", [False, True])
def test_sums_and_gradients_are_the_formulas(
    x_TD: Tensor, weight: float, chunk_tokens: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the loss that is compiled, here without the compiler."""
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", {"cpu": chunk_tokens * 11})
    monkeypatch.setattr(torch, "compile", lambda function: function)
    head = small_head(weight)
    if compiled:
        head.compile_loss()
        assert "differentiated" in vars(head)
    ours, theirs = (x_TD.clone().requires_grad_() for _ in range(2))
    table = head.weight.detach().clone().requires_grad_()
    loss, expected = head(ours, TARGETS_T), plain(theirs, table, weight)
    torch.testing.assert_close(loss.cross_entropy.double(), expected[0])
    torch.testing.assert_close(loss.z.double(), expected[1])
    (loss.objective * 0.25).backward()
    ((expected[0] + expected[1]) * 0.25).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(head.weight.grad, table.grad)
    assert ours.grad is not None and ours.grad[TARGETS_T == IGNORED_TARGET].eq(0).all()


def test_whole_logits_are_never_made(x_TD: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", {"cpu": 2 * 11})
    seen = []
    head = small_head(0.0)
    inner = head.losses
    monkeypatch.setattr(head, "losses", lambda logits, targets: (seen.append(len(logits)), inner(logits, targets))[1])
    head(x_TD.requires_grad_(), TARGETS_T).objective.backward()
    assert seen == [2, 2, 2, 1]


def test_no_targets_no_loss(x_TD: Tensor) -> None:
    loss = small_head(1e-2)(x_TD, torch.full((7,), IGNORED_TARGET))
    assert (loss.cross_entropy.item(), loss.z.item()) == (0.0, 0.0)


def test_bf16_logits_are_summed_in_fp32(x_TD: Tensor) -> None:
    head = small_head(1e-2).bfloat16()
    logits = head(x_TD.bfloat16())
    loss = head(x_TD.bfloat16(), TARGETS_T)
    assert torch.equal(torch.stack(head.losses(logits.float(), TARGETS_T)), torch.stack(loss[1:3]))
    assert loss.cross_entropy.dtype == torch.float32


def test_large_logits_neither_overflow_nor_lose_the_gradient() -> None:
    head = small_head(0.0)
    logits = (1e4 * torch.eye(2, 11)).requires_grad_()
    cross_entropy, _ = head.losses(logits, torch.tensor([0, 0]))
    assert cross_entropy.item() == pytest.approx(1e4)
    (grad,) = torch.autograd.grad(cross_entropy, logits)
    torch.testing.assert_close(grad, torch.eye(2, 11) - torch.eye(2, 11)[[0, 0]])
