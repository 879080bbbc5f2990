"""Holds out a document, or the end of a single one, for a split that small inputs would leave empty."""

from pathlib import PurePosixPath

import numpy as np

from triplane.data.content import LONG_BYTES
from triplane.data.decompression import COMPRESSIONS
from triplane.data.manifest import Tokens, token_dtype
from triplane.data.readers import is_one_text
from triplane.data.shards import SplitWriter
from triplane.data.sources import SourceFile
from triplane.data.tokenizer import Tokenizer

MOST_TOKENS = 1 << 22
"""Largest single document to cut in two."""


def text_and_its_end(file: SourceFile, fraction: float, *, most_bytes: int) -> list[SourceFile]:
    """Cuts a long local text before its last `fraction`: at a line end, else a space, else a character.

    Returns no files if it cannot.

    `most_bytes` is the limit of a document. A short text, which may be compressed or a row, is cut by `hold_out`.
    """
    size, compressed = file.size or 0, PurePosixPath(file.path).suffix.lower() in COMPRESSIONS
    if "://" in file.path or compressed or not is_one_text(file) or not LONG_BYTES < size <= most_bytes:
        return []
    near = round(size * (1 - fraction))
    with open(file.path, "rb") as content:
        content.seek(max(0, near - LONG_BYTES))
        before = content.read(min(near, LONG_BYTES))
    ends = (before.rfind(b"\n") + 1, before.rfind(b" "), _last_start(before))
    cut = near - len(before) + next((end for end in ends if end > 0), 0)
    if not 0 < cut < size:
        return []
    return [
        file._replace(part=range(cut), size=cut),
        file._replace(name=f"{file.name}, its end", format=".txt", part=range(cut, size), size=size - cut),
    ]


def _last_start(content: bytes) -> int:
    """Returns where the last character begins in UTF-8; 0 if there is none."""
    return next((at for at in range(len(content) - 1, 0, -1) if content[at] & 0xC0 != 0x80), 0)


def hold_out(train: SplitWriter, validation: SplitWriter, tokenizer: Tokenizer, fraction: float) -> bool:
    """Moves the last document of one split, with its copies, to the other; cuts a single document in two.

    `fraction` is the held-out share of a single document. Does nothing if neither is possible, or if a shard is
    finished, which could contain further copies. Returns True if it cut a document.
    """
    full, empty = (train, validation) if train.counts.documents else (validation, train)
    if full.has_shards:
        return False
    taken, others_stay = full.take_last()
    if not taken:
        return False
    if others_stay:
        for document in taken:
            _move(document, full, empty, tokenizer)
        return False
    text = tokenizer.decode(taken[0].tolist()) if len(taken) == 1 and len(taken[0]) <= MOST_TOKENS else ""
    cut = _cut(text, round(len(text) * (1 - fraction)))
    if cut is None:
        return False  # nothing is lost: the caller reports the empty split and writes no corpus
    full.counts.add(len(taken[0]), len(text.encode()), -1)
    for split, part in ((train, text[:cut]), (validation, text[cut:])):
        document = _encoded(part, tokenizer)
        split.put(document)
        split.counts.add(len(document), len(part.encode()))
    return True


def _move(document: Tokens, full: SplitWriter, empty: SplitWriter, tokenizer: Tokenizer) -> None:
    text_bytes = len(tokenizer.decode(document.tolist()).encode())
    full.counts.add(len(document), text_bytes, -1)
    empty.counts.add(len(document), text_bytes)
    empty.put(document)


def _cut(text: str, near: int) -> int | None:
    """Finds the last line end, else space, else character before `near`, with text on both sides."""
    near = min(max(near, 1), len(text) - 1)
    places = (text.rfind("\n", 0, near) + 1, text.rfind(" ", 0, near), near)
    return next((at for at in places if 0 < at < len(text)), None)


def _encoded(text: str, tokenizer: Tokenizer) -> Tokens:
    return np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], token_dtype(tokenizer.vocab_size))
