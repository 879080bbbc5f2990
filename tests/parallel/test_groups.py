"""The groups of a split model: as few as the layout uses, each with the run's time limit."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import _world

from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.groups import peers
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks

LAYOUTS = [{"tp": 2, "pp": 2, "dp": 2}, {"tp": 2, "cp": 2, "dp": 2}, {"cp": 2, "pp": 2, "dp": 2}, {"tp": 4, "dp": 2}]


def test_ranks_along_axes_are_those_of_the_mesh_in_row_major_order() -> None:
    sizes = {"tp": 2, "cp": 3, "dp": 4, "pp": 5}
    rank = 1 + 2 * (2 + 3 * (3 + 4 * 4))  # the last place on every axis
    assert peers(rank, sizes, set()) == [rank]
    assert peers(rank, sizes, {"tp"}) == [rank - 1, rank]
    assert peers(rank, sizes, {"pp"}) == [rank - 24 * back for back in (4, 3, 2, 1, 0)]
    assert peers(rank, sizes, {"dp", "cp"}) == list(range(97, 120, 2))
    assert peers(rank, sizes, set(sizes)) == list(range(120))


def _groups(_: Mesh) -> tuple[list[list[int]], list[timedelta]]:
    """The ranks of each group on this rank, and the time limits of all."""
    limits = [group._get_backend(torch.device("cpu")).options._timeout for group in _world.pg_map]
    return sorted(sorted(ranks) for ranks in _world.pg_group_ranks.values()), limits


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_a_rank_has_one_group_for_each_set_of_peers_and_all_have_the_time_limit(axes: dict[str, Any]) -> None:
    for ranks, limits in run_ranks(ParallelConfig(**axes, timeout_s=47.0), 8, _groups):
        assert len({tuple(group) for group in ranks}) == len(ranks) <= 8
        assert set(limits) == {timedelta(seconds=47)}
