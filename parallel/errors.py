"""What a user can do wrong in this room."""


class LayoutError(ValueError):
    """A layout that does not fit the ranks or the model; one line with the operands."""
