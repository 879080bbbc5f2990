"""What can go wrong while training, told to the user."""


class TrainingError(ValueError):
    """A run that cannot go on; one line with what to do."""
