"""Reads files written elsewhere: any problem with one, or with a name in it, is a one-line error."""

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from triplane.storage.errors import CheckpointError, printable

_MOST_BYTES = 64 * 2**20
"""Largest JSON file to read."""


def _printable(name: str) -> str:
    if not name.isprintable():  # it could fake another line of a message
        raise ValueError("contains unprintable characters")
    return name


def _plain(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError("not a plain file name")
    return name


Name = Annotated[str, AfterValidator(_printable)]
"""Name of a tensor."""
FileName = Annotated[Name, AfterValidator(_plain)]
"""Name of a file in the same folder as the file that mentions it."""
Place = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
"""A path or URL."""


def refuse_unprintable(path: Path) -> None:
    """Raises CheckpointError for a path that is not UTF-8: safetensors cannot open it, and JSON cannot hold it."""
    shown = os.fsencode(path).decode(errors="backslashreplace")
    if shown != str(path):
        raise CheckpointError(f"{shown}: not UTF-8; rename it")


def regular_file(path: Path) -> int:
    """Returns the size of a regular file; refuses pipes and devices, which could block forever."""
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return found.st_size


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; raises CheckpointError with its path."""
    if (size := regular_file(path)) > _MOST_BYTES:
        raise CheckpointError(f"{path}: {size:,} bytes, more than {_MOST_BYTES:,}")
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


def parse_json(content: bytes | str) -> Any:
    """Parses JSON; raises a one-line ValueError for invalid or too deeply nested input, or if memory runs out."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except MemoryError:
        raise ValueError("too large for this machine's memory") from None


def first_problem(error: ValidationError) -> str:
    """Describes the first key that a schema refuses: its name in the file, its value and the reason."""
    first = error.errors(include_url=False)[0]
    key = printable(".".join(map(str, first["loc"])))  # the file's own keys are among them
    if first["type"] == "missing":
        return f"no {key}"
    if first["type"] == "extra_forbidden":
        return f"the key {key} is unknown"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "dict_type"):
        reason = "no table of keys"
    if not key:
        return reason
    found = repr(first["input"])
    return f"{key} is {found if len(found) <= 60 else found[:57] + '...'}: {reason[0].lower()}{reason[1:]}"
