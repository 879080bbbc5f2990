"""The learning rate as a pure function of the step, with no state to save."""

import math

from triplane.training.config import ScheduleConfig, TrainingConfig


def warmup_steps(schedule: ScheduleConfig, training: TrainingConfig, seq_len: int) -> int:
    """Returns the steps of warm-up, from whichever of `warmup_steps` and `warmup_tokens` is given.

    `seq_len` is that of the first sequences.
    """
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    assert schedule.warmup_tokens is not None, "the config check requires one of the two"
    return math.ceil(training.updates(-(-schedule.warmup_tokens // seq_len)))


def decay_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Returns the steps at the end of a wsd run in which the rate decays; at least one."""
    return max(1, round(schedule.decay_fraction * steps))


def learning_rate(schedule: ScheduleConfig, step: int, *, peak: float, steps: int, warmup_steps: int) -> float:
    """Returns the learning rate of update `step`, counted from 1 to `steps`.

    Rises linearly from `peak / warmup_steps` at step 1 to `peak` at step `warmup_steps`, then decays
    according to `schedule.kind`, to exactly `final_lr_fraction * peak` at step `steps`.
    """
    assert 1 <= step <= steps, (step, steps)
    if step <= warmup_steps:
        return peak * (step / warmup_steps)
    if schedule.kind == "constant":
        return peak
    before = steps - decay_steps(schedule, steps) if schedule.kind == "wsd" else warmup_steps
    # 0 at the last step of the peak, 1 at the last step of the run.
    progress = max(0.0, (step - before) / (steps - before))
    fall = (1 - math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else progress
    return peak * (1 - fall + schedule.final_lr_fraction * fall)
