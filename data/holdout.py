"""Holds out a document for a split that small inputs would leave empty."""

import numpy as np

from triplane.data.manifest import Tokens, token_dtype
from triplane.data.shards import SplitWriter
from triplane.data.tokenizer import Tokenizer

MOST_TOKENS = 1 << 22
"""Largest single document to cut in two."""


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
