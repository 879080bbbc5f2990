"""Identifies the model that a run started from: its name and licence accompany the weights."""

import re
from pathlib import Path

from pydantic import BaseModel

from triplane.storage.errors import CheckpointError
from triplane.storage.foreign import regular_file

_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]{1,100})", re.MULTILINE)
_MOST_BYTES = 2**20


class Parent(BaseModel, strict=True, frozen=True):
    """A parent model, as a model card names it."""

    name: str
    licence: str | None = None
    """The hub's identifier; None if the folder gives none."""
    context: int | None = None
    """Tokens of context, `max_position_embeddings`."""


def parent_in(folder: Path, context: int) -> Parent:
    """Returns the model in a Hugging Face folder: name from the folder or hub cache, licence from its card or file."""
    path = folder.resolve()
    name = path.name
    if path.parent.name == "snapshots":
        name = path.parents[1].name.removeprefix("models--").replace("--", "/")
    return Parent(name=name, licence=_licence(folder), context=context)


def _licence(folder: Path) -> str | None:
    front = _FRONT.match(_text(folder / "README.md"))
    if front and (found := _LICENCE.search(front[1])):
        return found[1]
    return "other" if any(folder.glob("LICEN[CS]E*")) else None


def _text(path: Path) -> str:
    try:
        regular_file(path)
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES).decode(errors="replace").replace("\r\n", "\n")
    except (CheckpointError, OSError):
        return ""  # a folder without a readable card gives no licence
