"""Text to ids and back, whatever made the tokenizer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from triplane.data.blocks import BLOCK_CHARS, Block, blocks
from triplane.data.manifest import Tokens, token_dtype
from triplane.storage.errors import DataError
from triplane.storage.files import write_whole


class Tokenizer(ABC):
    """Text to ids and back. Open one with `open_tokenizer`."""

    files: Mapping[str, bytes]
    """Names and contents of what another process needs to open it."""
    digest: str
    """SHA-256, that of the file if there is one; two tokenizers with one digest give the same ids."""
    vocab_size: int
    bos_id: int
    """Begins each document; the same as `eos_id` where the tokenizer has one token for both."""
    eos_id: int
    context_chars: int
    """What `encode_block` must know of the text before a block."""

    @abstractmethod
    def encode_whole(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos; takes some 100 bytes of memory for each byte of the text."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens have none."""

    @abstractmethod
    def find_cut(self, text: str, start: int, stop: int) -> int | None:
        """See FindCut."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos; nothing in `text` becomes a special token."""
        return [id for block in self.blocks([text]) for id in self._encode(block)[1]]

    def blocks(self, pieces: Iterable[str], block_chars: int = BLOCK_CHARS) -> Iterator[Block]:
        """Cuts the text that `pieces` make so that the ids of the blocks are those of the text."""
        return blocks(pieces, self.find_cut, self.context_chars, block_chars)

    def encode_exactly(self, block: Block, name: str) -> Tokens:
        """Ids of a block of the document `name`; raises DataError, with the first difference, if they decode to
        another text."""
        before, ids = self._encode(block)
        text, decoded = block.context + block.text, self.decode(before + ids)
        if decoded == text:
            return np.array(ids, token_dtype(self.vocab_size))
        at = next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b), min(len(text), len(decoded)))
        was, became, place = text[at : at + 20], decoded[at : at + 20], block.start - len(block.context) + at
        raise DataError(f"{name}: the tokenizer alters it at character {place}: {was!r} comes back as {became!r}")

    def save(self, folder: Path) -> None:
        """Writes its files."""
        for name, content in self.files.items():
            write_whole(folder / name, content)

    def _encode(self, block: Block) -> tuple[list[int], list[int]]:
        """Ids of the context, and of the block."""
        before = self.encode_whole(block.context) if block.context else []
        ids = self.encode_whole(block.context + block.text)
        assert ids[: len(before)] == before, (block.context, block.text[:20])
        return before, ids[len(before) :]
