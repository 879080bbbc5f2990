"""Layouts that the quick proof lacks, and what only one layout shows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from planted_expert_bugs import IN_GROUPS
from planted_further_bugs import EMBEDDED, FURTHER

from triplane.parallel import (
    packing,
)
from triplane.parallel.devices import missing_to_compile
from triplane.parallel.sharded import ShardedOptimizer
from triplane.prove.command import Result


@pytest.mark.parametrize(
    "layout",
    [
        {"dp": 4, "dp_shard": 2, "zero": 3},
        {"dp": 4, "dp_shard": 2, "zero": 3, "optimizer": "muon"},
        {"tp": 2, "dp": 2, "zero": 3, "optimizer": "normuon"},
        {"dp": 2, "zero": 3, "optimizer": "averaged"},
        {"dp": 2, "dp_shard": 1, "zero": 3},
        {"zero": 3, "offload_optimizer": True},
    ],
    ids=str,
)
def test_zero_3_shards_over_some_replicas_or_one(layout: dict[str, Any], proven: Callable[..., Result]) -> None:
    result = proven(**layout)
    assert result.passed, result


@pytest.mark.parametrize(
    "layout",
    [
        {"dp": 4},
        {"dp": 2, "zero": 0, "precision": "bf16"},
        {"dp": 2, "zero": 2, "precision": "bf16"},
        {"tp": 2, "pp": 2, "dp": 2, "zero": 2, "tied": True},
        {"dp": 4, "dp_shard": 2, "zero": 2},
    ],
    ids=str,
)
def test_gradients_are_reduced_in_buckets(
    layout: dict[str, Any], proven: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BUCKET_ELEMENTS", 3000)
    monkeypatch.setattr(packing, "SHARE_ELEMENTS", 0)
    built = ShardedOptimizer.__init__

    def counted(self: Any, *args: Any, **options: Any) -> None:
        built(self, *args, **options)
        assert len(self.buckets) > 2

    monkeypatch.setattr(ShardedOptimizer, "__init__", counted)
    result = proven(**layout)
    assert result.passed, result


@pytest.mark.skipif(missing_to_compile(on_gpu=False) is not None, reason="no C++ compiler")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "layout",
    [
        # The graph for two documents of 48 tokens was once used for four of 24.
        {"cp": 2},
        # Two biases of one stream once had their gradients, which are equal, in the same memory.
        {"tp": 2, "sequence_parallel": True, "options": ("GELU", "parallel")},
    ],
    ids=str,
)
def test_gradients_by_torchs_own_compiler_are_right(layout: dict[str, Any], proven: Callable[..., Result]) -> None:
    result = proven(**layout, compile=True)
    assert result.passed, result


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("option", ["output norms", "QK-norm over all heads"])
def test_what_tp_sums_in_place_goes_through_the_compiler(
    option: str, proven: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    result = proven(tp=2, compile=True, options=(option,))
    assert result.passed, result


@pytest.mark.parametrize("zero", [0, 1])
def test_the_stages_of_a_rank_share_a_table_that_tp_has_split_once(proven: Callable[..., Result], zero: int) -> None:
    result = proven(tp=2, pp=2, virtual_stages=2, zero=zero, options=("T5 bias",))
    assert result.passed, result


@pytest.mark.parametrize(
    "layout",
    [
        {"pp": 2, "virtual_stages": 2, "tied": True, "options": (FURTHER,)},
        {"pp": 2, "dp": 2, "zero": 3, "options": EMBEDDED},
        {"tp": 2, "sequence_parallel": True, "pp": 2, "tied": True, "options": EMBEDDED},
        {"pp": 2, "dp": 2, "ep": 2, "options": (FURTHER, IN_GROUPS)},
    ],
    ids=str,
)
def test_the_last_stage_embeds_to_predict_further(layout: dict[str, Any], proven: Callable[..., Result]) -> None:
    result = proven(**layout)
    assert result.passed, result


@pytest.mark.parametrize("optimizer", ["muon", "muon by head", "normuon"])
def test_matrices_of_experts_that_tp_and_ep_split_are_brought_together(
    proven: Callable[..., Result], optimizer: str
) -> None:
    result = proven(tp=2, dp=2, ep=2, options=(IN_GROUPS,), optimizer=optimizer)
    assert result.passed, result
