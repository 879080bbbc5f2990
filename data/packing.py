"""Packs documents into sequences by best fit, cutting only those longer than a sequence.

Each shard is packed by itself, so that a sequence reads one shard. The plan is a file: making it takes a pass over
all document lengths, and reading it is a memory map.
"""

import hashlib
import io
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triplane.data.corpus import Corpus
from triplane.data.cuts import Piece, Pieces
from triplane.storage.errors import DataError
from triplane.storage.files import write_whole


class Packing:
    """The sequences of a best-fit plan."""

    def __init__(self, pieces: NDArray[np.int64], bounds: NDArray[np.int64], *, seq_len: int, run: int):
        """`pieces` is (P, 2); rows `bounds[i]` to `bounds[i + 1]` make up sequence i."""
        self._pieces = pieces
        self._bounds = bounds
        self.n_sequences = len(bounds) - 1
        self.run = run
        self.n_runs = self.n_sequences // run
        self.seq_len = seq_len

    def pieces(self, numbers: NDArray[np.int64]) -> list[Pieces]:
        """Returns the pieces of these sequences."""
        ends = zip(self._bounds[numbers].tolist(), self._bounds[numbers + 1].tolist())
        return [tuple(map(tuple, self._pieces[start:end].tolist())) for start, end in ends]

    @property
    def padding(self) -> float:
        """Fraction of all positions that is padding."""
        return 1 - int(self._pieces[:, 1].sum()) / (self.n_sequences * self.seq_len)


def packing(corpus: Corpus, seq_len: int, *, run: int, folder: Path) -> Packing:
    """Loads the plan in `folder` for this corpus and length; first makes it if missing.

    Raises DataError if the plan there is damaged or the disk is full.
    """
    path = folder / f"{corpus.digest[:16]}-{seq_len}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _write(path, corpus, seq_len)
    header, pieces, bounds = _load(path)
    if header != (expected := _header(corpus, seq_len, pieces, bounds)):
        raise DataError(f"{path}: damaged: expected {expected}, found {header}: remove it; it will be rebuilt")
    return Packing(pieces, bounds, seq_len=seq_len, run=run)


def pack(lengths: NDArray[np.uint32], seq_len: int) -> list[list[Piece]]:
    """Packs a shard with documents of `lengths` tokens; pieces start at tokens of the shard.

    A document of n tokens predicts n - 1. A longer one is cut into full sequences; its remainder, and each document
    that fits, goes whole into the fullest sequence that has room, longest first.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    targets = lengths.astype(np.int64) - 1
    full = targets // seq_len
    sequences = [
        [(start + i * seq_len, seq_len)]
        for start, count in zip(starts[full > 0].tolist(), full[full > 0].tolist())
        for i in range(count)
    ]
    rests = targets % seq_len
    open_at: list[list[list[Piece]]] = [[] for _ in range(seq_len + 1)]
    """Unfilled sequences by free room."""
    rooms: list[int] = []
    """Rooms that unfilled sequences have, ascending."""
    for document in np.argsort(-rests, kind="stable")[: np.count_nonzero(rests)].tolist():
        count = int(rests[document])
        at = bisect_left(rooms, count)
        if at < len(rooms):
            room = rooms[at]
            sequence = open_at[room].pop()
            if not open_at[room]:
                rooms.pop(at)
        else:
            room, sequence = seq_len, []
            sequences.append(sequence)
        sequence.append((int(starts[document] + full[document] * seq_len), count))
        room -= count
        if not open_at[room]:
            insort(rooms, room)
        open_at[room].append(sequence)
    # In stored order; otherwise long documents would come first.
    return sorted(sorted(sequence) for sequence in sequences)


def _write(path: Path, corpus: Corpus, seq_len: int) -> None:
    pieces, sizes = [], []
    shard_start = 0
    for shard, lengths in zip(corpus.manifest.shards, corpus.document_lengths_by_shard()):
        sequences = pack(lengths, seq_len)
        local = np.array([piece for sequence in sequences for piece in sequence], np.int64)
        pieces.append(local + np.array([shard_start, 0]))
        sizes += [len(sequence) for sequence in sequences]
        shard_start += shard.tokens
    all_pieces = np.concatenate(pieces)
    bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    buffer = io.BytesIO()
    for array in (np.array(_header(corpus, seq_len, all_pieces, bounds)), all_pieces, bounds):
        np.save(buffer, array)
    write_whole(path, buffer.getvalue())


def _header(corpus: Corpus, seq_len: int, pieces: NDArray[np.int64], bounds: NDArray[np.int64]) -> str:
    content = hashlib.sha256(np.ascontiguousarray(pieces).data)
    content.update(np.ascontiguousarray(bounds).data)
    return f"{corpus.digest} {seq_len} {content.hexdigest()}"


def _load(path: Path) -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    try:
        with open(path, "rb") as file:
            header = str(np.load(file, allow_pickle=False))
            arrays = []
            for _ in range(2):
                assert np.lib.format.read_magic(file) == (1, 0)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                arrays.append(np.memmap(path, dtype, "r", file.tell(), shape))
                file.seek(arrays[-1].nbytes, io.SEEK_CUR)
    except (AssertionError, ValueError, OSError) as error:
        raise DataError(f"{path}: damaged: {error}: remove it; it will be rebuilt") from error
    return header, arrays[0], arrays[1]
