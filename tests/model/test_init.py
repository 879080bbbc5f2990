"""Initial weights: one pure function, whichever part is asked for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config

from triplane.model.init import initial_weight

CONFIG = small_config(n_layers=8, init_std=0.05)
SHAPE = torch.Size((2500, 24))  # crosses two boundaries of the rows drawn together, the last group is short


def whole(name: str, seed: int = 0, shape: torch.Size = SHAPE) -> torch.Tensor:
    return initial_weight(CONFIG, seed, name, shape=shape, offsets=(0,) * len(shape), sizes=tuple(shape))


def spans(size: int) -> st.SearchStrategy[list[int]]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)


@given(spans(2500), spans(24))
@settings(max_examples=60)
def test_a_part_is_a_slice_of_the_whole(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    (top, bottom), (left, right) = rows, columns
    sizes = (bottom - top, right - left)
    part = initial_weight(CONFIG, 0, "head.weight", shape=SHAPE, offsets=(top, left), sizes=sizes)
    assert torch.equal(part, whole("head.weight")[top:bottom, left:right])


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.weight", 0.05),
        ("head.weight", 0.05),
        ("blocks.0.attention.wq.weight", 0.05),
        ("blocks.7.feed_forward.w_up.weight", 0.05),
        ("blocks.0.attention.wo.weight", 0.05 / math.sqrt(16)),
        ("blocks.7.feed_forward.w_down.weight", 0.05 / math.sqrt(16)),
    ],
)
def test_matrices_are_normal_and_smaller_where_they_write_to_the_residual_stream(name: str, std: float) -> None:
    weight = whole(name, shape=torch.Size((1200, 200)))
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=0.01 * std)
    assert (weight.abs() < std).float().mean().item() == pytest.approx(0.6827, abs=0.01)


def test_norms_are_ones() -> None:
    part = initial_weight(
        CONFIG, 0, "blocks.0.attention_norm.weight", shape=torch.Size((48,)), offsets=(16,), sizes=(8,)
    )
    assert torch.equal(part, torch.ones(8))


def test_seeds_names_and_groups_of_rows_are_independent() -> None:
    draws = [whole("head.weight"), whole("head.weight", seed=1), whole("embedding.weight")]
    draws += [draws[0].roll(1024, dims=0)]
    correlations = torch.corrcoef(torch.stack(draws).flatten(1)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.02  # five standard deviations of independent draws


def test_the_numbers_stay_what_they_were() -> None:
    """A change here makes every seed another run."""
    corner = whole("embedding.weight")[1023:1025, :2]
    expected = torch.tensor([[0.0491075, 0.0344443], [0.0182093, 0.0369448]])
    torch.testing.assert_close(corner, expected, atol=1e-6, rtol=0)
