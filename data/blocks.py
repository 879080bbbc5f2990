"""A text as blocks that can be encoded one at a time: memory is bounded by the block, not by the document."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

BLOCK_CHARS = 1 << 17
"""Characters after which a cut is looked for."""
AHEAD_CHARS = 1 << 10
"""What is known of the text after a cut."""
_MOST_CHARS = 1 << 21
"""A block grows up to this size where the text has no place for a cut, as in a run of one character."""

FindCut = Callable[[str, int, int], int | None]
"""(text, start, stop) -> the last place in (start, stop] where a cut changes no token; None if there is none."""


class UncuttableError(ValueError):
    """The text holds more characters without a place for a cut than may be encoded at once; the message is a reason."""


class Block(NamedTuple):
    """A part of a text, and what is before it."""

    context: str
    """The end of the text before the block: tokenizers treat the start of a text in a way of their own."""
    text: str
    start: int
    """Characters of the whole text before the block."""


def blocks(
    pieces: Iterable[str], find_cut: FindCut, context_chars: int, block_chars: int = BLOCK_CHARS
) -> Iterator[Block]:
    """Cuts the text that `pieces` make, which may be of any size; raises UncuttableError."""
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
    """Cuts between two characters that stand side by side in no token: merging never crosses such a place.

    Holds for a tokenizer that joins characters to tokens and has no other rule, and then without exception.
    """

    def __init__(self, tokens: Iterable[str]):
        """`tokens` are those of the vocabulary that are text; a space may be written as U+2581."""
        spaced = (token.replace("\u2581", " ") for token in tokens)
        self._joined = {token[i : i + 2] for token in spaced for i in range(len(token) - 1)}

    def find_cut(self, text: str, start: int, stop: int) -> int | None:
        """See FindCut."""
        spaced, joined = text[start : stop + 1].replace("\u2581", " "), self._joined
        for at in range(len(spaced) - 1, 0, -1):
            if spaced[at - 1 : at + 1] not in joined:
                return start + at
        return None
