"""What a user's model choices or weights can get wrong."""


class ModelError(ValueError):
    """One line: what is wrong, where, and what to do."""
