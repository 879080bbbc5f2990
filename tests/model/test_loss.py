"""Cross-entropy and z-loss against their formulas."""

import pytest
import torch

from triplane.model.batch import IGNORED_TARGET
from triplane.model.loss import CrossEntropy


@pytest.fixture
def scores():
    return 3 * torch.randn(7, 11, generator=torch.Generator().manual_seed(0))


TARGETS_T = torch.tensor([3, IGNORED_TARGET, 0, 10, IGNORED_TARGET, 5, 5])


def plain(logits_TV, weight):
    """The sums by definition, in fp64, over the rows that have a target."""
    kept = TARGETS_T != IGNORED_TARGET
    rows = logits_TV.double()[kept]
    partition = rows.exp().sum(dim=-1).log()
    chosen = rows[torch.arange(len(rows)), TARGETS_T[kept]]
    return (partition - chosen).sum(), weight * partition.square().sum()


@pytest.mark.parametrize("weight", [0.0, 1e-2])
def test_sums_and_gradients_are_the_formulas(scores, weight):
    ours, theirs = (scores.clone().requires_grad_() for _ in range(2))
    loss, expected = CrossEntropy(weight)(ours, TARGETS_T), plain(theirs, weight)
    torch.testing.assert_close(loss.cross_entropy.double(), expected[0])
    torch.testing.assert_close(loss.z.double(), expected[1])
    sum(loss).backward()
    sum(expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad[TARGETS_T == IGNORED_TARGET].eq(0).all()


def test_no_targets_no_loss(scores):
    loss = CrossEntropy(1e-2)(scores, torch.full((7,), IGNORED_TARGET))
    assert (loss.cross_entropy.item(), loss.z.item()) == (0.0, 0.0)


def test_bf16_logits_are_summed_in_fp32(scores):
    rounded = scores.bfloat16()
    low, full = CrossEntropy(1e-2)(rounded, TARGETS_T), CrossEntropy(1e-2)(rounded.float(), TARGETS_T)
    assert low == full
    assert low.cross_entropy.dtype == torch.float32
