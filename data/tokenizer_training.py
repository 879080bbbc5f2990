"""Trains a sentencepiece tokenizer that decodes to the exact text."""

import hashlib
import heapq
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from triplane.data.blocks import Block
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError, TriplaneError
from triplane.storage.files import write_whole

_PIECE_CHARS = 1 << 16
"""Longer documents are cut for training, so that a huge file can be sampled too."""
_ODD_TEXT = "<s>a</s><unk><0x41>  b\r\n\t\0\u2581\ufeff\U0001f642e\u0301 "
"""Text that tokenizers are known to alter."""


def train_tokenizer(
    documents: Iterable[str], path: Path, vocab_size: int | None, sample_bytes: int = 10_000_000
) -> Tokenizer:
    """Trains byte-pair encoding on a sample of `documents` and writes the model to `path`.

    `vocab_size` None: a power of two near the square root of the bytes of text, or what such text allows. The file
    depends on the documents, but not on their order. Raises DataError if there is no text, too little for `vocab_size`,
    or if the tokenizer alters text.
    """
    sample, text_bytes = _sample(documents, sample_bytes)
    if not sample:
        raise DataError(f"{path}: no text to train a tokenizer on")
    size = vocab_size or 2 ** min(max(round(math.log2(text_bytes) / 2), 9), 15)
    try:
        model = _trained(sample, size) if vocab_size else _fitting(sample, size)
    except _SizeError as error:
        raise DataError(f"{path}: no tokenizer of {size} ids from this text: {error}") from error
    write_whole(path, model)
    tokenizer = open_tokenizer(path)
    try:
        for i, text in enumerate([_ODD_TEXT, *sample[:100]]):
            tokenizer.encode_exactly(Block("", text, 0), f"training text {i}" if i else "a text of ours")
    except TriplaneError:
        path.unlink()
        raise
    return tokenizer


class _SizeError(Exception):
    """The text allows no vocabulary of a size, but one of `limit`."""

    def __init__(self, reason: str, limit: int):
        super().__init__(reason)
        self.limit = limit


def _fitting(sample: list[str], size: int) -> bytes:
    """Returns a model file of `size`, or near it; raises _SizeError if the text allows no vocabulary."""
    for _ in range(2):  # too few for its characters, then more than they combine to
        try:
            return _trained(sample, size)
        except _SizeError as error:
            size = error.limit if error.limit < size else 2 ** error.limit.bit_length()
    return _trained(sample, size)


def _trained(sample: list[str], vocab_size: int) -> bytes:
    """Returns the model file; raises _SizeError."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            required_chars="\u2581",  # else text with few spaces loses them: each becomes bytes, which decode to U+2581
            allow_whitespace_only_pieces=True,  # indentation: a third fewer tokens in source code
            split_digits=True,
            max_sentence_length=4 * _PIECE_CHARS,
            num_threads=1,  # the model file names the number
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rpartition("] ")[2]  # drops the place in the C++ source
        if least := re.search(rf"required_chars\. {vocab_size} vs (\d+)", reason):
            reason = f"its characters, the 256 bytes and the special tokens take {least[1]}; give at least that many"
            raise _SizeError(reason, int(least[1])) from error
        if most := re.search(r"value <= (\d+)", reason):
            raise _SizeError(reason, int(most[1])) from error
        raise
    return model.getvalue()


def _sample(documents: Iterable[str], max_bytes: int) -> tuple[list[str], int]:
    """Returns the pieces with the smallest hashes, at least one, up to `max_bytes`; and the bytes of all documents."""
    kept: list[tuple[int, bytes]] = []
    size, end, total = 0, 1 << 64, 0
    for document in documents:
        for start in range(0, len(document), _PIECE_CHARS):
            piece = document[start : start + _PIECE_CHARS].encode()
            total += len(piece)
            rank = int.from_bytes(hashlib.blake2b(piece, digest_size=8).digest(), "little")
            if rank >= end:
                continue
            heapq.heappush(kept, (-rank, piece))
            size += len(piece)
            while size > max_bytes and len(kept) > 1:
                negative_rank, dropped = heapq.heappop(kept)
                size, end = size - len(dropped), -negative_rank
    return [piece.decode() for _, piece in sorted(kept, reverse=True)], total
