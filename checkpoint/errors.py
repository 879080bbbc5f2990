"""What a user can put right in a checkpoint or an export."""


class CheckpointError(ValueError):
    """One line: what is wrong, where, and what to do."""
