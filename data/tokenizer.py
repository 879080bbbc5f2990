"""Converts text to ids and back, whatever library made the tokenizer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from triplane.data.blocks import BLOCK_CHARS, Block, blocks
from triplane.data.manifest import Tokens, token_dtype
from triplane.storage.errors import DataError
from triplane.storage.files import write_whole


class Tokenizer(ABC):
    """Converts text to ids and back. Open one with `open_tokenizer`."""

    files: Mapping[str, bytes]
    """Names and contents of the files with which another process can open it."""
    digest: str
    """SHA-256, of the file if it is a single one; equal digests mean equal ids."""
    vocab_size: int
    bos_id: int
    """Starts each document; equals `eos_id` where the tokenizer has one token for both."""
    eos_id: int
    context_chars: int
    """Characters before a block on which its encoding may depend."""

    @abstractmethod
    def encode_whole(self, text: str) -> list[int]:
        """Encodes `text` without bos and eos; takes about 100 bytes of memory per byte of text."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Decodes `ids`, omitting special tokens."""

    @abstractmethod
    def find_cut(self, text: str, start: int, stop: int) -> int | None:
        """See FindCut."""

    def encode(self, text: str) -> list[int]:
        """Encodes `text` without bos and eos; nothing in `text` becomes a special token."""
        return [id for block in self.blocks([text]) for id in self._encode(block)[1]]

    def decode_each(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of `ids` as they come, each part once later ids cannot change it.

        What a character lacks may follow, and decoders treat spaces by what does: both wait. If the last character
        stays incomplete, it may be left out.
        """
        seen: list[int] = []
        shown = text = ""
        for id in ids:
            seen.append(id)
            text = self.decode(seen)
            ready = text.rstrip(" \ufffd")
            if len(ready) > len(shown):
                yield _beyond(shown, ready)
                shown = ready
        yield _beyond(shown, text)

    def blocks(self, pieces: Iterable[str], block_chars: int = BLOCK_CHARS) -> Iterator[Block]:
        """Cuts the concatenation of `pieces` so that the ids of the blocks are those of the text."""
        return blocks(pieces, self.find_cut, context_chars=self.context_chars, block_chars=block_chars)

    def encode_exactly(self, block: Block, name: str) -> Tokens:
        """Encodes a block of the document `name`; raises DataError, with the first difference, if the ids decode to
        another text."""
        before, ids = self._encode(block)
        text, decoded = block.context + block.text, self.decode(before + ids)
        if decoded == text:
            return np.array(ids, token_dtype(self.vocab_size))
        at = next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b), min(len(text), len(decoded)))
        was, became, place = text[at : at + 20], decoded[at : at + 20], block.start - len(block.context) + at
        raise DataError(f"{name}: the tokenizer alters it at character {place}: {was!r} comes back as {became!r}")

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files."""
        for name, content in self.files.items():
            write_whole(folder / name, content)

    def _encode(self, block: Block) -> tuple[list[int], list[int]]:
        """Returns the ids of the context, and of the block."""
        before = self.encode_whole(block.context) if block.context else []
        ids = self.encode_whole(block.context + block.text)
        assert ids[: len(before)] == before, (block.context, block.text[:20])
        return before, ids[len(before) :]


def _beyond(shown: str, text: str) -> str:
    """Returns the end of `text` from where it differs from what was shown: some decoders change spaces later."""
    if text.startswith(shown):
        return text[len(shown) :]
    return text[next((at for at, (a, b) in enumerate(zip(text, shown)) if a != b), len(text)) :]
