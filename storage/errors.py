"""Errors that a user can fix. Programmers' mistakes are assertions."""


class TriplaneError(ValueError):
    """One line per problem: what is wrong, where, and what to do."""


class ConfigError(TriplaneError):
    """A run config that cannot work."""


class LaunchError(TriplaneError):
    """Ranks or jobs that cannot be started, or a run that cannot be found."""


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
    """A corrupt checkpoint; an older one may be intact."""


class OutOfReachError(CheckpointError, OSError):
    """Storage that does not respond or denies access; its checkpoints may be intact."""


class StorageError(TriplaneError):
    """A file, folder or URL that cannot be read, written or locked."""


class BusyError(StorageError):
    """A folder that another process holds for now."""


class NoLocksError(StorageError):
    """A file system without locks, which cannot keep two processes apart."""


def counted(number: int, thing: str) -> str:
    """Returns `1 rank`, `1,000 ranks`."""
    if number == 1:
        return f"1 {thing}"
    return f"{number:,} {thing}{'es' if thing.endswith('s') else 's'}"


def printable(text: str) -> str:
    """Escapes the unprintable characters of foreign text: line breaks and terminal control sequences."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
