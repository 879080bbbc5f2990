"""Cuts a text into blocks that are encoded one at a time, so that the block, not the document, bounds memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

BLOCK_CHARS = 1 << 17
"""Characters after which to look for a cut."""
AHEAD_CHARS = 1 << 10
"""Characters of lookahead after a cut."""
_MOST_CHARS = 1 << 21
"""Largest block where the text has no place for a cut, as in a run of one character."""

FindCut = Callable[[str, int, int], int | None]
"""(text, start, stop) -> the last place in (start, stop] where a cut changes no token, or None."""


class UncuttableError(ValueError):
    """The text has no place for a cut within the largest block; the message is a reason."""


class Block(NamedTuple):
    """A part of a text, with its context."""

    context: str
    """End of the text before the block; needed because tokenizers treat the start of a text specially."""
    text: str
    start: int
    """Offset of the block in the whole text, in characters."""


def blocks(
    pieces: Iterable[str], find_cut: FindCut, *, context_chars: int, block_chars: int = BLOCK_CHARS
) -> Iterator[Block]:
    """Cuts the concatenation of `pieces`, which may have any size; raises UncuttableError."""
    context, text, start, searched = "", "", 0, 0
    for piece in pieces:
        text += piece
        while len(text) - AHEAD_CHARS >= searched + block_chars:
            stop = searched + block_chars
            cut = find_cut(text, searched, stop)
            if cut is None:
                searched = stop
                if searched > _MOST_CHARS:
                    raise UncuttableError(f"no place to cut it: {searched:,} characters from character {start:,} on")
                continue
            yield Block(context, text[:cut], start)
            context = (context + text[:cut])[-context_chars:] if context_chars else ""
            text, start, searched = text[cut:], start + cut, 0
    if text:
        yield Block(context, text, start)


class SafePairs:
    """Cuts between two characters that are adjacent in no token, where no merge can cross.

    Exact for a tokenizer whose only rule is to merge characters into tokens.
    """

    def __init__(self, tokens: Iterable[str]):
        """`tokens` are the vocabulary's text tokens; U+2581 may stand for a space."""
        spaced = (token.replace("\u2581", " ") for token in tokens)
        self._joined = {token[i : i + 2] for token in spaced for i in range(len(token) - 1)}

    def find_cut(self, text: str, start: int, stop: int) -> int | None:
        """See FindCut."""
        spaced, joined = text[start : stop + 1].replace("\u2581", " "), self._joined
        for at in range(len(spaced) - 1, 0, -1):
            if spaced[at - 1 : at + 1] not in joined:
                return start + at
        return None
