"""Every choice of a run. The tables of the network, the data, the layout and the checkpoints are in their rooms."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from triplane.checkpoint.config import CheckpointConfig
from triplane.data.config import DataConfig
from triplane.model.config import ModelConfig
from triplane.parallel.config import ParallelConfig
from triplane.training.run_folder import RunFolder


class OptimizerConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """AdamW (Loshchilov and Hutter 2019)."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices, not to norms."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""


class ScheduleConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Learning rate over the run: linear warm-up, then the decay named by `kind`."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """`wsd`: warm-up, stable, then linear decay in the last `decay_fraction` (MiniCPM)."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of warm-up; give this or `warmup_tokens`."""
    warmup_tokens: NonNegativeInt | None = None
    """Tokens of warm-up, rounded up to whole steps."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd: the fraction of all steps that decays."""


class TrainingConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """How much, how big a step, and what is reported."""

    steps: PositiveInt
    """Optimizer updates in the whole run."""
    global_batch_size: PositiveInt
    """Sequences in one update, over all ranks."""
    micro_batch_size: PositiveInt
    """Sequences that one dp rank computes at once."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` keeps fp32 master weights. `auto`: bf16 on GPUs; on a CPU the faster of the two, measured at the start."""
    log_every_steps: PositiveInt = 10
    """Steps between lines of metrics."""
    eval_every_steps: PositiveInt = 500
    """Steps between validations; there is one after the last step too."""
    eval_sequences: PositiveInt = 256
    """Validation sequences read each time, always the same ones."""
    sample_every_steps: PositiveInt | None = None
    """Steps between text samples in TensorBoard; None: no samples."""
    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """Where rank 0 serves the newest metrics, at every address of its machine, for Prometheus; None: nowhere."""
    stop_at_step: PositiveInt | None = None
    """Save and leave after this step as though the run had been interrupted; the schedule does not change."""


class FaultsConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """What a run does when something goes wrong."""

    max_restarts: NonNegativeInt = 3
    """How often `triplane train` starts the ranks of this machine again after a crash or a hang; each time only if a
    checkpoint has been written since."""
    hang_timeout_s: float | None = Field(default=None, gt=0, le=1e7)
    """A step, validation, save and the like that takes longer is a hang. None: ten times the median of its kind, at
    least 60, and 1800 for the first of a kind. A start has 1800 at least."""
    max_rollbacks: NonNegativeInt = 3
    """How often in the whole run a loss or gradient that is no finite number, or is a spike, sends it back to the last
    checkpoint, to go on without the batch that gave it."""
    spike_z: PositiveFloat | None = None
    """A loss or gradient norm this many deviations above the median of the last `spike_window` steps is a spike; the
    deviation is estimated from the median absolute one. None: only what is not finite is bad."""
    spike_window: int = Field(default=64, ge=4)
    """Steps; until there are as many, no spike is seen."""
    compare_replicas_every_steps: PositiveInt | None = None
    """Steps between comparisons of the weights of ranks that should have the same, bit by bit, which find faulty memory
    and arithmetic. None: never."""
    repeat_step_every_steps: PositiveInt | None = None
    """Steps between those that are done twice from the same state and compared, bit by bit, which finds arithmetic that
    errs at times; takes the time of one step more, and as much memory as the optimizer's state. None: never."""


class ProfileConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Steps of which torch's profiler writes traces, into the folder `profile` of the run."""

    start_step: PositiveInt | None = None
    """The first of them, better not the run's first; None: no traces."""
    steps: PositiveInt = 3
    """How many; a trace of a step takes megabytes."""
    ranks: list[NonNegativeInt] = Field(default=[0], min_length=1)
    """Those that write one each."""


class RunConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """All choices of a run; a table in the file for each room."""

    run_dir: str = Field(min_length=1)
    """Folder of the run: checkpoints, metrics, logs. Started again, the run goes on from what is there."""
    seed: int = Field(default=0, ge=0)
    """Decides the initial weights and the order of the data."""
    model: ModelConfig
    """The network."""
    data: DataConfig
    """What is read, in which order."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model spreads over ranks."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    training: TrainingConfig
    """How long, how big a step, what is reported."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When state is saved, what is kept."""
    faults: FaultsConfig = FaultsConfig()
    """What happens when something goes wrong."""
    profile: ProfileConfig = ProfileConfig()
    """Which steps are traced."""

    @property
    def folder(self) -> RunFolder:
        """The folder of the run."""
        return RunFolder(Path(self.run_dir))
