"""Shares of flat buffers: where parameters lie, who shares with whom, and what is not trained."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from triplane.parallel import engine, megatron, packing  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.packing import bucket_runs, pack
from triplane.prove.forked import run_ranks

SIZES = [700, 64, 3, 320, 128, 900, 1, 65, 500]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_parameters_lie_apart_in_equal_shares(shares: int, whole: bool) -> None:
    starts, share = pack(SIZES, shares, whole=whole)
    runs = sorted((start, start + size) for start, size in zip(starts, SIZES))
    assert all(end <= start for (_, end), (start, _) in pairwise(runs))
    assert runs[0][0] >= 0 and runs[-1][1] <= shares * share
    if whole:
        assert all(start // share == (end - 1) // share for start, end in runs)
    else:
        assert shares * share <= sum(SIZES) + 64 * (len(SIZES) + shares)


def test_the_largest_whole_parameters_are_on_different_ranks() -> None:
    starts, share = pack([10, 10, 4000, 4000, 4000], 3, whole=True)
    assert {start // share for start in starts[2:]} == {0, 1, 2}
    assert share < 4200


@pytest.mark.parametrize("whole", [False, True])
def test_buckets_hold_all_parameters_in_order(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BUCKET_ELEMENTS", 1000)
    monkeypatch.setattr(packing, "SHARE_ELEMENTS", 0)
    found = bucket_runs(SIZES, 2, whole=whole)
    assert [number for run in found for number in run] == list(range(len(SIZES)))
    assert (whole or len(found) > 1) and all(sum(SIZES[number] for number in run) >= 1000 for run in found)


def _groups(mesh: Mesh) -> tuple[list[int], list[int]]:
    """The ranks that share with this one, and those that hold the same share."""
    spread = mesh.spread
    found = []
    for axis in (spread.shards, spread.copies):
        assert axis.group is not None
        ranks = torch.distributed.get_process_group_ranks(axis.group)
        assert ranks[axis.rank] == mesh.rank and len(ranks) == axis.size
        found.append(ranks)
    return found[0], found[1]


@pytest.mark.parametrize(
    ("layout", "shards", "copies"),
    [
        ({"dp": 4, "dp_shard": 2}, [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ({"tp": 2, "dp": 4, "dp_shard": 2}, [[0, 2], [1, 3]], [[0, 4], [1, 5]]),
        ({"cp": 2, "dp": 2, "dp_shard": 2}, [[0, 1], [0, 1], [2, 3]], [[0, 2], [1, 3], [0, 2]]),
    ],
    ids=str,
)
def test_neighbours_share(layout: dict[str, Any], shards: list[list[int]], copies: list[list[int]]) -> None:
    config = ParallelConfig(**layout)
    assert isinstance(config.dp, int)
    found = run_ranks(config, config.ranks_of_one * config.dp, _groups)
    for answer, *expected in zip(found, shards, copies):
        assert answer == tuple(expected)
