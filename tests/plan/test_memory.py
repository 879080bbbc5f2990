"""The plan's memory is what real ranks take, and its parameters are those that they hold."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from benchmark_scripts import benchmark
from small_models import small_config

from triplane.model.count import count_parameters
from triplane.model.describe import model_weights
from triplane.model.parts.balance import SequenceLoss
from triplane.model.parts.experts import Experts
from triplane.model.parts.further import PredictFurther
from triplane.model.parts.latent import Latent
from triplane.parallel.config import ParallelConfig
from triplane.parallel.stages import copied_weights
from triplane.plan.memory import peak_memory
from triplane.plan.shares import Work, held, in_flight, parameters, pipeline
from triplane.training.optimizers.adamw import AdamW
from triplane.training.optimizers.kinds import AnyOptimizer
from triplane.training.optimizers.lion import Lion
from triplane.training.optimizers.muon import Muon

memory = benchmark("memory")


def experts_over_four(**layout: Any) -> Work:
    """Two ranks for each half of eight experts."""
    return Work(
        model=memory.MODEL.model_copy(update={"feed_forward": Experts(n_experts=8, active=2, hidden_dim=192)}),
        layout=ParallelConfig(dp=4, ep=2, **layout),
        dp=4,
        bf16=True,
        micro_batch_size=2,
        micro_batches=2,
        seq_len=32,
    )


def work(micro_batches: int = 4, **layout: Any) -> Work:
    return Work(
        model=small_config(n_layers=9),
        layout=ParallelConfig(dp=1, **layout),
        dp=1,
        bf16=True,
        micro_batch_size=2,
        micro_batches=micro_batches,
        seq_len=32,
    )


@pytest.mark.parametrize(
    ("layout", "micro_batches", "bf16"),
    [
        ({"zero": 0, "recompute": ["full", "none"]}, 2, False),
        ({"recompute": "selective"}, 1, True),
        ({"dp": 2, "zero": 2}, 2, True),
        ({"dp": 2, "zero": 3}, 2, True),
        ({"dp": 2, "zero": 3, "recompute": "selective"}, 2, True),
        ({"pp": 2, "dp": 2, "zero": 3}, 4, True),
        ({"tp": 2, "sequence_parallel": True, "recompute": "selective"}, 2, True),
        ({"cp": 2}, 2, False),
        ({"pp": 2, "virtual_stages": 2}, 4, True),
        ({"pp": 2, "dp": 2}, 4, True),
    ],
)
def test_the_peak_of_real_ranks_is_as_predicted(layout: dict[str, Any], micro_batches: int, bf16: bool) -> None:
    # A buffer that a thread of gloo frees seems to stay, to the profiler; under load that befalls a bucket.
    tries = [list(memory.compare(layout, micro_batches, bf16)) for _ in range(2 if layout.get("zero") == 2 else 1)]
    for name, measured, predicted in min(tries, key=lambda found: max(measured.peak for _, measured, _ in found)):
        # Gradients on their way to others in backward may have arrived before the peak.
        most = 1.25 if layout.get("zero") == 2 else 1.1
        assert 0.9 < predicted.peak / measured.peak < most, (name, predicted.peak, measured.peak)
        assert predicted.state == pytest.approx(measured.state, rel=0.05), name
        # Of a pipeline several micro-batches are in flight; what gloo's threads free in tp is not seen.
        if not layout.keys() & {"pp", "tp"}:
            assert predicted.activations == pytest.approx(measured.activations, rel=0.1), name


PARTS: dict[str, Any] = {
    "feed_forward": Experts(n_experts=8, active=2, hidden_dim=192, shared=1, balance=SequenceLoss()),
    "attention": Latent(n_heads=8, q_rank=48, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=16),
    "predict_further": PredictFurther(depth=2),
}


@pytest.mark.parametrize(
    ("part", "layout"),
    [
        *product(PARTS, ({}, {"recompute": "selective"})),
        ("feed_forward", {"dp": 2, "ep": 2}),
        ("feed_forward", {"dp": 4, "ep": 2, "zero": 2}),
        ("feed_forward", {"dp": 4, "ep": 2, "zero": 3}),
        ("predict_further", {"dp": 2, "zero": 3}),
        ("predict_further", {"pp": 2}),
        ("predict_further", {"pp": 2, "dp": 2, "zero": 3}),
    ],
)
def test_the_memory_of_other_parts_is_as_predicted(
    part: str, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MODEL", memory.MODEL.model_copy(update={part: PARTS[part]}))
    for name, measured, predicted in memory.compare(layout, 1, True):
        assert predicted.peak == pytest.approx(measured.peak, rel=0.1), name
        assert predicted.state == pytest.approx(measured.state, rel=0.05), name
        if part != "predict_further":  # which is measured after the other blocks
            assert predicted.activations == pytest.approx(measured.activations, rel=0.1), name


def test_what_fp8_keeps_besides_is_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of each input and weight of its products in place of two of the inputs; nothing changes for experts."""
    monkeypatch.setattr(memory, "MODEL", memory.MODEL.model_copy(update={"feed_forward": PARTS["feed_forward"]}))
    (_, *plain), (_, *eight) = (next(memory.compare({"fp8": fp8}, 1, True)) for fp8 in (False, True))
    measured, predicted = (ours.activations - theirs.activations for ours, theirs in zip(eight, plain))
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("layout", "of_others", "of_experts"),
    [
        ({"zero": 0}, 1, 2),  # of 4 ranks 2 hold the same half of the experts
        ({"zero": 1}, 4, 4),
        ({"zero": 2}, 4, 4),
        ({"zero": 3}, 4, 4),
        ({"dp_shard": 2}, 2, 2),  # both halves are among the neighbours that share
        ({"dp_shard": 1}, 1, 2),
    ],
    ids=str,
)
def test_experts_over_ranks_share_their_state_among_those_that_hold_them(
    layout: dict[str, Any], of_others: int, of_experts: int
) -> None:
    of_all = 6 * 8 * 3 * 192 * 128  # layers, experts, matrices, hidden and model dim
    one = experts_over_four(**layout)
    others = count_parameters(one.model) - of_all
    (rank,) = pipeline(one)
    found = peak_memory(one, rank)
    assert found.weights == (0 if one.layout.zero == 3 else 2 * (others + of_all // 2))
    assert found.optimizer == 12 * (others // of_others + of_all // of_experts)


def test_whole_experts_go_to_ranks_at_zero_3() -> None:
    """Of eight ranks that hold the same four experts, four have one each."""
    one = replace(experts_over_four(zero=3), dp=16)
    (rank,) = pipeline(one)
    own = held(one, rank)
    assert own.updated == pytest.approx((own.parameters - own.experts) / 16 + 6 * 3 * 192 * 128, rel=1e-3)


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize(
    ("optimizer", "of_matrices", "of_others"),
    [
        (AdamW(), 2, 2),
        (AdamW(average_decay=0.99), 3, 3),
        (Lion(kind="lion"), 1, 1),
        (Muon(kind="muon"), 1, 2),
        (Muon(kind="muon", second_moment_decay=0.95), 1 + 1 / 128, 2),  # a value for each row of 128 or 192
    ],
    ids=["adamw", "averaged", "lion", "muon", "normuon"],
)
def test_each_optimizer_keeps_values_of_its_own(
    optimizer: AnyOptimizer, of_matrices: float, of_others: float, zero: int
) -> None:
    one = replace(experts_over_four(zero=zero), optimizer=optimizer)
    (rank,) = pipeline(one)
    weights = list(model_weights(one.model).values())
    matrices = sum(weight.elements for weight in weights if weight.role == "matrix") / 4
    others = sum(weight.elements for weight in weights if weight.role != "matrix") / 4
    expected = 4 * ((1 + of_matrices) * matrices + (1 + of_others) * others)
    assert peak_memory(one, rank).optimizer == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("layout", [{}, {"pp": 3}, {"pp": 2, "virtual_stages": 2}])
def test_the_ranks_of_a_pipeline_hold_the_model_and_copies(layout: dict[str, Any]) -> None:
    one = work(**layout)
    biased = one.model.attention.model_copy(update={"qkv_bias": True})
    changes: list[dict[str, Any]] = [
        {},
        {"attention": biased},
        {"tie_embeddings": True},
        {"predict_further": PredictFurther()},
    ]
    for model in (one.model.model_copy(update=change) for change in changes):
        own = replace(one, model=model)
        copies = sum(model_weights(model)[name].elements for name in copied_weights(model)) if layout else 0
        assert sum(parameters(own, rank) for rank in pipeline(own)) == count_parameters(model) + copies


def test_micro_batches_in_flight_are_those_of_the_schedules() -> None:
    assert [in_flight(work(8, pp=4), rank) for rank in pipeline(work(8, pp=4))] == [[4], [3], [2], [1]]
    assert [in_flight(work(2, pp=4), rank) for rank in pipeline(work(2, pp=4))] == [[2], [2], [2], [1]]
    # Warm-up of rank 0 of 2: two forwards before the last rank starts, two of the first stage, and one more.
    interleaved = work(4, pp=2, virtual_stages=2)
    assert [in_flight(interleaved, rank) for rank in pipeline(interleaved)] == [[3, 2], [2, 1]]
