"""Learning rates worked by hand, and what holds for every schedule."""

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triplane.training.config import BatchPhase, ScheduleConfig, TrainingConfig
from triplane.training.schedule import decay_steps, learning_rate, warmup_steps

PEAK = 8.0
KINDS = ("cosine", "linear", "wsd", "constant")


def rates(schedule: ScheduleConfig, steps: int, warmup: int) -> list[float]:
    return [learning_rate(schedule, step, peak=PEAK, steps=steps, warmup_steps=warmup) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [2, 4, 6, 8, 8, 8, 8, 8]),
        ("linear", [2, 4, 6, 8, 6.5, 5, 3.5, 2]),
        # Quarters of a half circle: cos(45 degrees) = 1 / sqrt(2).
        ("cosine", [2, 4, 6, 8, 5 + 3 * math.sqrt(0.5), 5, 5 - 3 * math.sqrt(0.5), 2]),
        # The last quarter of 8 steps decays.
        ("wsd", [2, 4, 6, 8, 8, 8, 5, 2]),
    ],
)
def test_values_by_hand(kind: Any, expected: list[float]) -> None:
    schedule = ScheduleConfig(kind=kind, final_lr_fraction=0.25, decay_fraction=0.25)
    assert rates(schedule, steps=8, warmup=4) == pytest.approx(expected, rel=1e-12)


def test_no_warm_up_falls_from_the_first_step() -> None:
    assert rates(ScheduleConfig(kind="linear", final_lr_fraction=0), steps=4, warmup=0) == [6, 4, 2, 0]


@given(
    st.sampled_from(KINDS),
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.integers(1, 300).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(0, steps - 1))),
)
def test_every_schedule_rises_to_the_peak_and_falls_to_the_exact_end(
    kind: Any, final: float, decay: float, steps_warmup: tuple[int, int]
) -> None:
    steps, warmup = steps_warmup
    schedule = ScheduleConfig(kind=kind, final_lr_fraction=final, decay_fraction=decay)
    if kind == "wsd":
        warmup = min(warmup, steps - decay_steps(schedule, steps))
    course = rates(schedule, steps, warmup)
    assert course[0] > 0 or steps == 1
    rise, fall = course[:warmup], course[max(warmup - 1, 0) :]
    assert rise == sorted(rise)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(fall))
    if warmup:
        assert rise[-1] == PEAK and rise[0] == pytest.approx(PEAK / warmup)
    assert course[-1] == (PEAK if kind == "constant" else PEAK * final)


def test_a_step_outside_of_the_run_is_a_mistake_of_ours() -> None:
    for step in (0, 5):
        with pytest.raises(AssertionError):
            learning_rate(ScheduleConfig(), step, peak=PEAK, steps=4, warmup_steps=1)


def test_warm_up_in_tokens_is_rounded_up_to_steps() -> None:
    training = TrainingConfig(steps=50, global_batch_size=10, micro_batch_size=1)
    assert [warmup_steps(ScheduleConfig(warmup_tokens=n), training, 10) for n in (0, 1, 100, 101)] == [0, 1, 1, 2]
    assert warmup_steps(ScheduleConfig(warmup_steps=7), training, 10) == 7
    ramp = training.model_copy(update={"batch_ramp": [BatchPhase(after_steps=2, global_batch_size=20)]})
    assert [warmup_steps(ScheduleConfig(warmup_tokens=n), ramp, 10) for n in (200, 201, 400, 401)] == [2, 3, 3, 4]


def test_the_steps_of_a_ramp_and_their_sequences() -> None:
    ramp = [BatchPhase(after_steps=2, global_batch_size=4), BatchPhase(after_steps=5, global_batch_size=2)]
    training = TrainingConfig(steps=8, global_batch_size=1, micro_batch_size=1, batch_ramp=ramp)
    sizes = [1, 1, 4, 4, 4, 2, 2, 2]
    assert [training.batch_size(step) for step in range(1, 9)] == sizes
    assert list(training.spans(1, 7)) == [(1, 1), (3, 4), (2, 2)]
    for done, last in itertools.combinations(range(9), 2):
        assert training.sequences(last, done) == sum(sizes[done:last])
        assert training.updates(sum(sizes[done:last]), done) == last - done
    assert training.updates(3) == Fraction(9, 4) and training.updates(1, done=4) == Fraction(1, 4)
    assert training.updates(14 + 2 * 100) == 5 + 100
