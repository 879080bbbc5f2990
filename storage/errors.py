"""Everything that a user can put right. Programmers' mistakes are assertions."""


class TriplaneError(ValueError):
    """One line for each problem: what is wrong, where, and what to do."""


class ConfigError(TriplaneError):
    """A run config that cannot work."""


class LaunchError(TriplaneError):
    """Ranks or jobs that cannot be started, or runs that cannot be found."""


class LayoutError(TriplaneError):
    """A layout that does not fit the ranks or the model; names the operands."""


class ModelError(TriplaneError):
    """A network or weights that cannot be used."""


class DataError(TriplaneError):
    """A corpus, an input or a tokenizer that cannot be used."""


class TrainingError(TriplaneError):
    """A run that cannot continue."""


class CheckpointError(TriplaneError):
    """A checkpoint or an export that cannot be written or read."""


class DamagedError(CheckpointError):
    """A checkpoint that differs from what was written; an older one may be intact."""


class OutOfReachError(CheckpointError, OSError):
    """Storage that does not answer or denies access; the checkpoints in it may be intact."""


class StorageError(TriplaneError):
    """A file, folder or URL that cannot be read, written or locked."""


class BusyError(StorageError):
    """Another process holds a folder, which may be free later."""


class NoLocksError(StorageError):
    """A file system without locks cannot keep two processes apart."""


def printable(text: str) -> str:
    """Returns text from elsewhere as part of one line, without characters that would move a terminal's cursor."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
