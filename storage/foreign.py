"""Files that came from elsewhere, and the names in them: whatever is wrong with one is a line."""

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from triplane.storage.errors import CheckpointError

_MOST_BYTES = 64 * 2**20
"""Of a JSON file that is read whole."""


def _printable(name: str) -> str:
    if not name.isprintable():  # it could pretend to be another line of a message
        raise ValueError("holds characters that cannot be printed")
    return name


def _plain(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError("not a plain file name")
    return name


Name = Annotated[str, AfterValidator(_printable)]
"""Of a tensor."""
FileName = Annotated[Name, AfterValidator(_plain)]
"""Of a file beside the one that names it, and of nothing elsewhere."""


def refuse_unprintable(path: Path) -> None:
    """Raises CheckpointError for a path that is not text: safetensors cannot open it, nor can JSON name it."""
    shown = os.fsencode(path).decode(errors="backslashreplace")
    if shown != str(path):
        raise CheckpointError(f"{shown}: not UTF-8; rename it")


def regular_file(path: Path) -> int:
    """The bytes of a regular file, or of one that a link leads to; a pipe or device would be read for ever."""
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return found.st_size


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises CheckpointError, which names it."""
    if (size := regular_file(path)) > _MOST_BYTES:
        raise CheckpointError(f"{path}: {size:,} bytes, more than {_MOST_BYTES:,}")
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from error


def parse_json(content: bytes | str) -> Any:
    """Raises ValueError, one line, for all that is no JSON, for too deep nesting and for too little memory too."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except MemoryError:
        raise ValueError("too large for this machine's memory") from None
