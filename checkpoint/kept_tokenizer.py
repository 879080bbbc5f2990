"""Keeps the tokenizer in a checkpoint, so that a copy can be sampled and exported anywhere."""

from typing import Any

from pydantic import BaseModel

from triplane.data.open_tokenizer import tokenizer_of
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DamagedError, TriplaneError
from triplane.storage.foreign import FileName
from triplane.storage.location import Location, read, writing

TOKENIZER_OPTION = "--tokenizer (tokenizer= in Python)"
"""How to give another tokenizer than the kept one."""


class KeptTokenizer(BaseModel, strict=True):
    """The tokenizer's entry in the state."""

    digest: str
    files: list[FileName]


def kept_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the state's entry for a tokenizer whose files lie beside the manifest."""
    return KeptTokenizer(digest=tokenizer.digest, files=list(tokenizer.files)).model_dump()


def write_tokenizer(tokenizer: Tokenizer, checkpoint: Location) -> dict[str, int]:
    """Writes the tokenizer's files into an unfinished checkpoint; returns their sizes for the manifest."""
    for name, content in tokenizer.files.items():
        with writing(checkpoint / name) as file:
            file.write(content)
    return {name: len(content) for name, content in tokenizer.files.items()}


def read_tokenizer(checkpoint: Location, kept: KeptTokenizer) -> Tokenizer:
    """Reads a checkpoint's tokenizer; raises DamagedError if it differs from the one that was written."""
    try:
        tokenizer = tokenizer_of({name: read(checkpoint / name) for name in kept.files}, checkpoint)
    except TriplaneError as error:
        raise DamagedError(
            f"{checkpoint}: its tokenizer is damaged ({error}); give another by {TOKENIZER_OPTION}"
        ) from error
    if tokenizer.digest != kept.digest:
        raise DamagedError(
            f"{checkpoint}: its tokenizer is damaged ({tokenizer.digest[:12]}, written as {kept.digest[:12]}); give "
            f"another by {TOKENIZER_OPTION}"
        )
    return tokenizer
