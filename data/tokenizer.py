"""A sentencepiece model: trained so that decoding gives back the text exactly."""

import hashlib
import heapq
import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from triplane.data.errors import DataError
from triplane.data.files import write_whole

_PIECE_CHARS = 1 << 16
"""Longer documents are cut for training, so that one huge file can be sampled as well."""
_SPACE = "\u2581"
"""Stands for a space inside sentencepiece, which would therefore decode a real one to a space."""
_ODD_TEXT = "<s>a</s><unk><0x41>  b\r\n\t\0\u2581\ufeff\U0001f642e\u0301 "
"""What tokenizers are known to alter."""


class Tokenizer:
    """Text to ids and back. `digest` is the SHA-256 of the model file."""

    def __init__(self, path: Path):
        """Raises DataError if `path` is no sentencepiece model with bos and eos."""
        try:
            model = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: not a readable sentencepiece model: {_one_line(error)}") from error
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{path}: the tokenizer lacks bos or eos, which mark where documents start and end")
        self._space_ids: list[int] = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos; nothing in `text` becomes a control symbol."""
        first, *rest = text.split(_SPACE)
        ids: list[int] = self._processor.encode(first)
        for part in rest:
            ids += self._space_ids + self._processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; control symbols have none."""
        text: str = self._processor.decode(ids)
        return text

    def encode_exactly(self, text: str, name: str) -> list[int]:
        """Ids of `text`; raises DataError, with the first difference, if they decode to another text."""
        ids = self.encode(text)
        decoded = self.decode(ids)
        if decoded == text:
            return ids
        at = next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b), min(len(text), len(decoded)))
        was, became = text[at : at + 20], decoded[at : at + 20]
        raise DataError(f"{name}: the tokenizer alters it at character {at}: {was!r} comes back as {became!r}")


def train_tokenizer(documents: Iterable[str], path: Path, vocab_size: int, sample_bytes: int = 10_000_000) -> Tokenizer:
    """Trains byte-pair encoding on a sample of `documents` and writes the model to `path`.

    The same documents give the same file, in whatever order they come. Raises DataError if there is no text or too
    little for `vocab_size`, or if the tokenizer alters text.
    """
    sample = _sample(documents, sample_bytes)
    if not sample:
        raise DataError(f"{path}: no text to train a tokenizer on")
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
            allow_whitespace_only_pieces=True,  # indentation: a third fewer tokens in source code
            split_digits=True,
            max_sentence_length=4 * _PIECE_CHARS,
            num_threads=1,  # the model file names the number
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = _one_line(error).rpartition("] ")[2]  # what is before it is the place in the C++ source
        raise DataError(f"{path}: no tokenizer of {vocab_size} ids from this text: {reason}") from error
    write_whole(path, model.getvalue())
    tokenizer = Tokenizer(path)
    try:
        for i, text in enumerate([_ODD_TEXT, *sample[:100]]):
            tokenizer.encode_exactly(text, f"training text {i}")
    except DataError:
        path.unlink()
        raise
    return tokenizer


def _sample(documents: Iterable[str], max_bytes: int) -> list[str]:
    """The pieces of documents whose hashes are smallest, at least one and up to `max_bytes`."""
    kept: list[tuple[int, bytes]] = []
    size, end = 0, 1 << 64
    for document in documents:
        for start in range(0, len(document), _PIECE_CHARS):
            piece = document[start : start + _PIECE_CHARS].encode()
            rank = int.from_bytes(hashlib.blake2b(piece, digest_size=8).digest(), "little")
            if rank >= end:
                continue
            heapq.heappush(kept, (-rank, piece))
            size += len(piece)
            while size > max_bytes and len(kept) > 1:
                negative_rank, dropped = heapq.heappop(kept)
                size, end = size - len(dropped), -negative_rank
    return [piece.decode() for _, piece in sorted(kept, reverse=True)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
