"""Wraps a sentencepiece model as a tokenizer."""

import hashlib
from functools import cached_property

import sentencepiece

from triplane.data.blocks import SafePairs
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError

SENTENCEPIECE_NAME = "tokenizer.model"
_SPACE = "\u2581"
"""Sentencepiece's stand-in for a space, so it would decode a literal one to a space."""


class SentencePieceTokenizer(Tokenizer):
    """Supports BPE and unigram models; text is encoded in blocks unless the model normalizes it."""

    def __init__(self, model: bytes, where: str):
        """Raises DataError, which names `where`, if `model` is not a sentencepiece model with bos and eos."""
        if not model:  # the library would take it for a missing argument, and load no model
            raise DataError(f"{where}: is empty; give a sentencepiece model or a Hugging Face tokenizer.json")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{where}: neither a sentencepiece model nor a Hugging Face tokenizer.json") from error
        self.files = {SENTENCEPIECE_NAME: model}
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{where}: the tokenizer lacks bos or eos, which mark where documents start and end")
        self._space_ids: list[int] = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        # If the model adds a leading space, each block after the first needs a context that absorbs it.
        self.context_chars = 1 if self._processor.normalize("a") != "a" else 0

    def encode_whole(self, text: str) -> list[int]:
        first, *rest = text.split(_SPACE)
        ids: list[int] = self._processor.encode(first)
        for part in rest:
            ids += self._space_ids + self._processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def find_cut(self, text: str, start: int, stop: int) -> int | None:
        return self._pairs.find_cut(text, start, stop) if self._pairs else None

    @cached_property
    def _pairs(self) -> SafePairs | None:
        """None for a model that normalizes, which may join or drop the characters around any cut."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        normalizer = ModelProto.FromString(self.files[SENTENCEPIECE_NAME]).normalizer_spec
        if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
            return None
        processor = self._processor
        ids = range(self.vocab_size)
        return SafePairs(processor.id_to_piece(i) for i in ids if not processor.is_control(i))
