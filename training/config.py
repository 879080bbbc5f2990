"""The configuration of a run; model, data, layout and checkpoint tables are defined in their packages."""

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt

from triplane.checkpoint.config import CheckpointConfig
from triplane.data.config import DataConfig
from triplane.model.config import ModelConfig
from triplane.parallel.config import ParallelConfig
from triplane.storage.foreign import Place
from triplane.training.optimizers.adamw import AdamW
from triplane.training.optimizers.kinds import AnyOptimizer
from triplane.training.run_folder import RunFolder


class ScheduleConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Learning rate over the run: linear warm-up, then decay according to `kind`."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """`wsd`: warm-up, stable, then linear decay in the last `decay_fraction` (MiniCPM)."""
    warmup_steps: NonNegativeInt | None = None
    """Warm-up steps; give this or `warmup_tokens`."""
    warmup_tokens: NonNegativeInt | None = None
    """Warm-up tokens, rounded up to whole steps."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate, as a fraction of the peak."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd: fraction of all steps in which the rate decays."""


class BatchPhase(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """A change of the batch size at a step of the run."""

    after_steps: PositiveInt
    """Steps before it."""
    global_batch_size: int = Field(gt=0, le=2**31 - 1)
    """Sequences per update from here on, over all ranks."""


class RunLength(BaseModel, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Updates in a run, and the sequences of each."""

    steps: int = Field(gt=0, le=10**12)
    """Optimizer updates in the whole run."""
    global_batch_size: int = Field(gt=0, le=2**31 - 1)
    """Sequences per update, over all ranks, until `batch_ramp` changes it."""
    batch_ramp: list[BatchPhase] = []
    """Changes of the batch size, in order. What is still to come may change when a run resumes."""

    @property
    def batch_sizes(self) -> list[tuple[int, int]]:
        """The steps before each batch size, and the size."""
        ramp = [(phase.after_steps, phase.global_batch_size) for phase in self.batch_ramp]
        return [(0, self.global_batch_size), *ramp]

    def batch_size(self, step: int) -> int:
        """Returns the sequences of update `step`, counted from 1."""
        return [size for before, size in self.batch_sizes if before < step][-1]

    def spans(self, done: int, last: int) -> Iterator[tuple[int, int]]:
        """Yields how many of the updates after `done`, up to `last`, are of one size, and the size; in order."""
        sizes = self.batch_sizes
        for (before, size), (end, _) in zip(sizes, [*sizes[1:], (last, 0)]):
            if (steps := min(end, last) - max(before, done)) > 0:
                yield steps, size

    def sequences(self, last: int, done: int = 0) -> int:
        """Returns the sequences of the updates after `done`, up to `last`."""
        return sum(steps * size for steps, size in self.spans(done, last))

    def updates(self, sequences: int, done: int = 0) -> Fraction:
        """Returns the updates after `done` that read `sequences`."""
        read = Fraction(0)
        for steps, size in self.spans(done, sys.maxsize):
            here = min(Fraction(steps), Fraction(sequences, size))
            read += here
            sequences -= int(here * size)
        return read


class TrainingConfig(RunLength, extra="forbid", frozen=True):
    """Length of the run, size of a step, and reporting."""

    micro_batch_size: int = Field(gt=0, le=2**31 - 1)
    """Sequences per forward pass of one dp rank."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` keeps fp32 master weights. `auto`: bf16 on GPUs; on a CPU the faster of the two, measured at the start."""
    log_every_steps: PositiveInt = 10
    """Steps between logged metrics, besides those of the first step. The loss is the mean over these steps."""
    eval_every_steps: PositiveInt = 500
    """Steps between validations; the last step is always validated."""
    eval_sequences: PositiveInt = 256
    """Sequences per validation, the same ones each time."""
    sample_every_steps: PositiveInt | None = None
    """Steps between text samples in TensorBoard; None: no samples."""
    noise_scale_every_steps: PositiveInt | None = None
    """Steps between estimates of the gradient noise scale, the tokens of a batch past which larger ones save few steps;
    each takes the time of a forward and backward pass. None: none."""
    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """Port on which rank 0 serves the latest metrics to Prometheus, on all interfaces; None: disabled."""
    stop_at_step: PositiveInt | None = None
    """Save and exit after this step, as if interrupted; the schedule does not change."""


class FaultsConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Detection of faults, and recovery from them."""

    max_restarts: NonNegativeInt = 3
    """Restarts of this machine's ranks by `triplane train` after crashes or hangs, each only if a checkpoint has been
    written since the last."""
    hang_timeout_s: float | None = Field(default=None, gt=0, le=1e7)
    """Time limit of a step, validation, save and so on, in seconds. None: ten times the median of its kind, at least
    60, and 1800 for the first of a kind. Starting always has at least 1800."""
    max_rollbacks: NonNegativeInt = 3
    """Rollbacks in the whole run: after a loss or gradient that is not finite or is a spike, the run returns to the
    last checkpoint and skips the batch that caused it."""
    spike_z: PositiveFloat | None = None
    """A loss or gradient norm this many deviations above the median of the last `spike_window` steps is a spike; the
    deviation is estimated from the median absolute deviation. None: only values that are not finite are anomalies."""
    spike_window: int = Field(default=64, ge=4)
    """Steps in the window; spikes are detected once it is full."""
    compare_replicas_every_steps: PositiveInt | None = None
    """Steps between bitwise comparisons of weights that should be equal across ranks, which detect faulty memory and
    arithmetic. None: never."""
    repeat_step_every_steps: PositiveInt | None = None
    """Steps between steps that are computed twice from the same state and compared bitwise, which detects intermittent
    arithmetic errors; costs the time of a step, and memory for a copy of the optimizer state. None: never."""


class ProfileConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Steps that torch's profiler traces, into the folder `profile` of the run."""

    start_step: PositiveInt | None = None
    """First step to trace; avoid step 1. None: no traces."""
    steps: PositiveInt = 3
    """Steps to trace; each takes megabytes."""
    ranks: list[NonNegativeInt] = Field(default=[0], min_length=1)
    """Ranks that write a trace each."""


class RunConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """The configuration of a run; one TOML table per package."""

    run_dir: Place
    """Folder of the run: checkpoints, metrics, logs. When started again, the run resumes from its newest checkpoint."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and the order of the data."""
    tracking: list[str] = []
    """Trackers and callbacks that follow the run: `wandb`, `trackio`, the name of an entry point in the group
    `triplane.callbacks`, or the place of a class, `module:Class`."""
    model: ModelConfig
    """The network."""
    data: DataConfig
    """Sources and their order."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the model over ranks."""
    optimizer: AnyOptimizer = AdamW()
    """How weights are updated."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run."""
    training: TrainingConfig
    """Length of the run, size of a step, and reporting."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When state is saved, and which checkpoints are kept."""
    faults: FaultsConfig = FaultsConfig()
    """Detection of faults, and recovery from them."""
    profile: ProfileConfig = ProfileConfig()
    """Steps to trace."""

    @property
    def folder(self) -> RunFolder:
        """The folder of the run."""
        return RunFolder(Path(self.run_dir))
