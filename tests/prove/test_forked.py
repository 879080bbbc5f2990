"""Forked ranks answer, or tell where they stand."""

import time
from pathlib import Path

import pytest
import torch

from triplane.parallel.config import ParallelConfig
from triplane.parallel.devices import missing_to_compile
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import RanksFailedError, run_ranks


def _wait_for_nothing(mesh: Mesh) -> None:
    if mesh.rank == 1:
        time.sleep(120)


def test_ranks_that_give_no_answer_tell_where_they_stand() -> None:
    with pytest.raises(RanksFailedError, match=r"no answer in 10 s\nrank 1:\n[^$]*_wait_for_nothing") as caught:
        run_ranks(ParallelConfig(dp=2), 2, _wait_for_nothing, timeout_s=10)
    assert "rank 0" not in str(caught.value)


@pytest.mark.skipif(missing_to_compile(on_gpu=False) is not None, reason="no C++ compiler")
@pytest.mark.usefixtures("compiler")
def test_ranks_compile_where_their_parent_has_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's compiler has threads, which do not survive a fork; what it has compiled before needs none."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def compiled(mesh: Mesh | None) -> float:
        work = torch.compile(lambda x: (x.sin() * 3 + (mesh is None)).exp())
        return float(work(torch.zeros(7))[0])

    assert compiled(None) == pytest.approx(2.718282)
    assert run_ranks(ParallelConfig(dp=2, compile=True), 2, compiled, timeout_s=60) == [1.0, 1.0]
