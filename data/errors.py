"""What a user can put right in data or tokenizer."""


def printable(text: str) -> str:
    """Text from elsewhere as part of one line, without characters that would move a terminal's cursor."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class DataError(ValueError):
    """Something is wrong with data or tokenizer; the message is one line: what, where, and what to do."""


class BusyError(DataError):
    """Another process is at work in a folder, which may be free later."""


class NoLocksError(DataError):
    """A file system that cannot keep two processes apart."""
