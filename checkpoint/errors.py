"""What can go wrong with a checkpoint or an export, told to the user."""


class CheckpointError(ValueError):
    """A checkpoint or export that cannot be written or used; one line with what to do."""


class DamagedError(CheckpointError):
    """A checkpoint that is not as it was written: an older one may be whole."""
