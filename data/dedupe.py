"""Finds exact and near duplicates among documents."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from triplane.data.journal import Journal
from triplane.storage.errors import DataError

Dedupe = Literal["none", "exact", "near"]

HASH_BYTES = 16
_PERMUTATIONS = 128
_SIGNATURE_BYTES = 4 * _PERMUTATIONS
_SHINGLE_WORDS = 5
_WORD_CHARS = 1 << 16
_SIMILARITY = 0.8
"""Documents are near duplicates from this Jaccard similarity of their five-word runs on, estimated by MinHash."""


class Duplicates:
    """The documents kept so far; of several duplicates, the first is kept.

    Uses about 100 bytes of memory per document kept, or 4 KiB with `near`.
    """

    def __init__(self, journal: Journal, mode: Dedupe):
        """Resumes from the journal's last commit."""
        self._mode = mode
        if mode == "none":
            return
        self._hash_log = journal.log("hashes")
        stored = self._hash_log.read()
        self._hashes = {stored[i : i + HASH_BYTES] for i in range(0, len(stored), HASH_BYTES)}
        if mode == "near":
            self._index = _minhash_library().MinHashLSH(_SIMILARITY, _PERMUTATIONS)
            self._signature_log = journal.log("signatures")
            stored = self._signature_log.read()
            for i in range(0, len(stored), _SIGNATURE_BYTES):
                self._index.insert(i, _as_minhash(stored[i : i + _SIGNATURE_BYTES]), check_duplication=False)

    def find(self, content_hash: bytes, signature: bytes) -> str | None:
        """Returns why the document is a duplicate; if it is not one, remembers it and returns None."""
        if self._mode == "none":
            return None
        if content_hash in self._hashes:
            return "exact duplicate"
        if self._mode == "near":
            minhash = _as_minhash(signature)
            if any(self._similarity(start, signature) >= _SIMILARITY for start in self._index.query(minhash)):
                return "near duplicate"
            self._index.insert(self._signature_log.size, minhash, check_duplication=False)
            self._signature_log.append(signature)
        self._hashes.add(content_hash)
        self._hash_log.append(content_hash)
        return None

    def _similarity(self, start: int, signature: bytes) -> float:
        stored = self._signature_log.read(start, _SIGNATURE_BYTES)
        return float(np.mean(np.frombuffer(stored, np.uint32) == np.frombuffer(signature, np.uint32)))


def minhash_signature(pieces: Iterable[str]) -> bytes:
    """Returns the MinHash of the five-word runs in the concatenation of `pieces`."""
    minhash = _new_minhash()
    words: list[str] = []
    is_whole = True
    for piece in _at_words(pieces):
        words += piece.split()
        if len(words) >= _SHINGLE_WORDS:
            _add_runs(minhash, words)
            words, is_whole = words[-_SHINGLE_WORDS + 1 :], False
    if is_whole:
        _add_runs(minhash, words)
    return minhash.hashvalues.astype(np.uint32).tobytes()


def _add_runs(minhash: Any, words: list[str]) -> None:
    runs = {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
    minhash.update_batch([run.encode() for run in sorted(runs)])


def _at_words(pieces: Iterable[str]) -> Iterator[str]:
    """Yields the text in pieces that end between words; a word of over 64 Ki characters may be cut."""
    rest = ""
    for piece in pieces:
        text = rest + piece
        if len(text) > _WORD_CHARS and not any(map(str.isspace, text[-_WORD_CHARS:])):
            yield text
            rest = ""
            continue
        end = next((i for i in range(len(text), 0, -1) if text[i - 1].isspace()), 0)
        if end:
            yield text[:end]
        rest = text[end:]
    yield rest


def check_library(mode: Dedupe) -> None:
    """Raises DataError if the library for `mode` is not installed."""
    if mode == "near":
        _minhash_library()


def _as_minhash(signature: bytes) -> Any:
    return _new_minhash(hashvalues=np.frombuffer(signature, np.uint32))


def _new_minhash(**values: Any) -> Any:
    return _minhash_library().MinHash(_PERMUTATIONS, seed=1, scheme="affine32", **values)


def _minhash_library() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise DataError("removing near duplicates requires datasketch: pip install 'triplane[dedupe]'") from error
    return datasketch
