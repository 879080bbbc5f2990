"""The choices that define when state is saved and what is kept."""

from pydantic import BaseModel, Field, PositiveInt


class CheckpointConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Checkpoints are written into `RUN/checkpoints/step_N`."""

    every_steps: PositiveInt = 1000
    """Save after each this many steps, and after the last."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints kept; older ones are deleted once a newer one is whole."""
