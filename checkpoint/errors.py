"""What can go wrong with a checkpoint or an export, told to the user."""


class CheckpointError(ValueError):
    """A checkpoint or export that cannot be written or used; one line with what to do."""


class OutOfReachError(CheckpointError, OSError):
    """A place that does not answer or does not let us in; its checkpoints may be whole."""


class DamagedError(CheckpointError):
    """A checkpoint that is not as it was written: an older one may be whole."""
