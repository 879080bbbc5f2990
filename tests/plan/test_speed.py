"""The plan's speed: near what others measured, and moved by each thing that should move it."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_scripts import benchmark
from small_models import small_config

from triplane.config.load import load_config
from triplane.model.parts.experts import Experts
from triplane.parallel.config import ParallelConfig
from triplane.plan.estimate import work_of
from triplane.plan.gpus import GPUS
from triplane.plan.rates import OURS, Rates
from triplane.plan.shares import Work, layer_products
from triplane.plan.speed import Speed, speed
from triplane.training.optimizers.muon import Muon

published = benchmark("plan")
ROOT = Path(__file__).parents[2]


def test_the_tables_in_the_docs_are_what_the_script_prints() -> None:
    assert published.tables() in (ROOT / "docs" / "plan.md").read_text()


def test_what_was_not_fitted_is_predicted() -> None:
    errors = [
        abs(row.predicted_mfu(published.PROGRAMS[row.program]) / row.mfu - 1)
        for row in published.rows()
        if not row.fitted
    ]
    assert statistics.median(errors) < 0.1
    assert sum(error > 0.25 for error in errors) <= 3


def test_models_with_experts_are_predicted_without_a_fit() -> None:
    errors = [row.predicted_mfu(published.PROGRAMS[row.program]) / row.mfu - 1 for row in published.experts()]
    assert len(errors) == 6
    assert max(map(abs, errors)) < 0.25


def work(*overrides: str, gpus: int = 256) -> Work:
    return work_of(load_config(ROOT / "configs" / "70b.toml", overrides), gpus)


def step_s(*overrides: str, gpus: int = 256) -> float:
    return speed(work(*overrides, gpus=gpus), GPUS["h100"]).step_s


def test_fp8_multiplies_shared_experts_and_no_others() -> None:
    experts = Experts(n_experts=8, active=2, hidden_dim=192, shared=3)
    one = replace(work(), model=small_config(dim=128, feed_forward=experts), layout=ParallelConfig(tp=2, fp8=True))
    attention, router, norms = 2 * (6 + 2) * 8 * 128, 8 * 128, 2 * 128
    assert layer_products(one, 0) == ((attention + 3 * 3 * 192 * 128) // 2, router + norms + 2 * 3 * 192 * 128 // 2)
    plain = replace(one, layout=ParallelConfig(tp=2))
    gpu = GPUS["h100"]
    rates = Rates(gpu, OURS)
    saved_s = speed(plain, gpu).products_s - speed(one, gpu).products_s
    each_s = 1 / rates.products_flops_per_s(True) - 1 / rates.products_flops_per_s(True, fp8=True)
    tokens = one.tokens * one.micro_batches * one.model.n_layers
    assert saved_s == pytest.approx(6 * layer_products(one, 0)[0] * tokens * each_s)


def test_a_step_is_never_faster_than_its_flops() -> None:
    found = speed(work(), GPUS["h100"], replace(OURS, products=1, attention=1, memory=1, node=1, network=1))
    assert 0 < found.mfu < 1
    assert found.tokens_per_s * found.step_s == pytest.approx(1024 * 4096)


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ((), ("parallel.recompute=none",)),
        (("parallel.recompute=full",), ()),
        (("parallel.recompute=full",), ('parallel.recompute=["full", "none"]',)),
        (('parallel.recompute=["full", "none"]',), ("parallel.recompute=none",)),
        (("parallel.virtual_stages=1",), ()),
        (("parallel.pp=8", "parallel.virtual_stages=1"), ("parallel.virtual_stages=1",)),
        (("parallel.compile=false",), ()),
        (("parallel.offload_optimizer=true",), ()),
        (("training.precision=fp32",), ()),
        (("parallel.zero=3",), ("parallel.zero=3", "parallel.dp_shard=4")),
        (("parallel.zero=3", "parallel.dp_shard=4"), ("parallel.zero=2", "parallel.dp_shard=4")),
    ],
)
def test_what_makes_a_step_slower(slower: dict[str, Any], faster: dict[str, Any]) -> None:
    assert step_s(*slower) > step_s(*faster)


def test_muon_multiplies_in_its_update() -> None:
    """Eight ranks share the matrices of a stage of 21 layers at most; the tp ranks do not."""
    muon = replace(work(), optimizer=Muon(kind="muon"))
    more_s = speed(muon, GPUS["h100"]).update_s - speed(work(), GPUS["h100"]).update_s
    dim, kv, hidden = 8192, 1024, 28672
    sides = [(dim, dim)] * 2 + [(kv, dim)] * 2 + [(dim, hidden)] * 3
    flops = 21 * 5 * sum(4 * small**2 * large + 2 * small**3 for small, large in sides)
    rate = GPUS["h100"].bf16_tflops * 1e12 * OURS.products
    assert more_s == pytest.approx(flops / 8 / rate, rel=0.01)


def test_twice_the_gpus_take_a_little_more_than_half_of_the_time() -> None:
    assert 0.5 < step_s(gpus=512) / step_s(gpus=256) < 0.6


def test_a_slow_network_shows_in_the_traffic_over_dp_alone() -> None:
    slow = GPUS["h100"].model_copy(update={"network_gb_per_s": 5})
    fast, held_up = speed(work(), GPUS["h100"]), speed(work(), slow)
    assert held_up.data_s > 5 * fast.data_s
    assert held_up.tensor_s == fast.tensor_s


def test_the_ends_of_a_pipeline_sum_the_gradients_of_their_copies() -> None:
    tied, apart = (speed(work(f"model.tie_embeddings={tie}"), GPUS["h100"]).data_s for tie in ("true", "false"))
    gradient = 4 * 128_256 * 8192 / 8  # bytes on one of 8 tp ranks
    assert tied - apart == pytest.approx(gradient / (OURS.network * GPUS["h100"].network_gb_per_s * 1e9), rel=0.01)


def test_tensor_parallel_traffic_leaves_the_machine_where_tp_does() -> None:
    small = GPUS["h100"].model_copy(update={"gpus_per_node": 4})
    assert speed(work(), small).tensor_s > 1.5 * speed(work(), GPUS["h100"]).tensor_s


@pytest.mark.parametrize("keys", [("zero=1",), ("zero=3",), ("zero=3", "dp_shard=8")], ids=str)
def test_experts_over_ranks_travel_among_those_that_hold_them(keys: tuple[str, ...]) -> None:
    """At ep 8 no gradient of an expert travels within a machine; rows do instead."""

    def found(ep: int) -> Speed:
        overrides = [f"parallel.{key}" for key in (f"ep={ep}", *keys)]
        return speed(work_of(load_config(ROOT / "configs" / "mixtral-8x7b.toml", overrides), 64), GPUS["h200"])

    assert found(8).data_s < 0.9 * found(1).data_s
    assert found(8).data_s > 0.1 * found(1).data_s  # the experts' own still cross machines
    assert found(8).context_s > found(1).context_s == 0


def mixtral(*overrides: str) -> Work:
    return work_of(load_config(ROOT / "configs" / "mixtral-8x7b.toml", overrides), 64)


def test_a_row_that_leaves_its_machine_goes_over_the_link_of_its_own_gpu() -> None:
    """A ring over two machines would use all links of both."""
    small, one = GPUS["h100"].model_copy(update={"gpus_per_node": 4}), mixtral()
    rows_bytes = one.tokens * 2 * one.model.dim * 2  # 2 experts, bf16
    exchanges = 6 * one.model.n_layers * one.micro_batches  # there and back: forward, again, and gradients
    elsewhere = rows_bytes / 2  # 4 of 8 ranks
    expected = exchanges * elsewhere / (OURS.network * small.network_gb_per_s * 1e9)
    assert speed(one, small).context_s == pytest.approx(expected, rel=0.05)
    assert speed(one, GPUS["h100"]).context_s < expected / 3


def test_compilation_leaves_the_copies_of_rows() -> None:
    fused = replace(OURS, fused=0)
    two, four = (mixtral("parallel.compile=true", f"model.feed_forward.active={active}") for active in (2, 4))
    moved = speed(four, GPUS["h100"], fused).memory_s - speed(two, GPUS["h100"], fused).memory_s
    rows_bytes = two.tokens * 2 * two.model.dim * 2 * two.model.n_layers * two.micro_batches
    passes = 4  # forward, again, and backward twice
    assert moved == pytest.approx(7 * rows_bytes * passes / 2 / (OURS.memory * 3350e9), rel=1e-3)
