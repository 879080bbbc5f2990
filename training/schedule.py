"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from triplane.training.config import ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, tokens_per_step: int) -> int:
    """Steps of warm-up, from whichever of `warmup_steps` and `warmup_tokens` is given."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    assert schedule.warmup_tokens is not None, "the config check demands one of the two"
    return -(-schedule.warmup_tokens // tokens_per_step)


def decay_steps(schedule: ScheduleConfig, steps: int) -> int:
    """wsd: the steps at the end of the run in which the rate falls; at least one."""
    return max(1, round(schedule.decay_fraction * steps))


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int, warmup_steps: int) -> float:
    """The rate of update `step`, which counts from 1 to `steps`.

    Rises in a line from `peak / warmup_steps` at step 1 to `peak` at step `warmup_steps`, then falls
    as `schedule.kind` says, to exactly `final_lr_fraction * peak` at step `steps`.
    """
    assert 1 <= step <= steps, (step, steps)
    if step <= warmup_steps:
        return peak * (step / warmup_steps)
    if schedule.kind == "constant":
        return peak
    before = steps - decay_steps(schedule, steps) if schedule.kind == "wsd" else warmup_steps
    # 0 at the last step at the peak, 1 at the last of all.
    progress = max(0.0, (step - before) / (steps - before))
    fall = (1 - math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else progress
    return peak * (1 - fall + schedule.final_lr_fraction * fall)
