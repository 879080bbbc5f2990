"""Loads batches as a function of (corpora, plan, position), however ranks and workers divide the work."""

import errno
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triplane.data.corpus import Corpus
from triplane.data.cuts import Piece
from triplane.data.plan import Chunk, Plan
from triplane.data.prefetch import Prefetcher
from triplane.storage.errors import DataError, TriplaneError

IGNORED_TARGET = -100
"""Target of positions without a loss."""

_CANNOT_SEND, _NO_FILE_LEFT = 74, 71
"""Exit statuses of a data worker, EX_IOERR and EX_OSERR."""
_MORE_SHM = "give shared memory (/dev/shm) more room, as by docker's --shm-size, or set data.num_workers=0"
_LACKS = {
    errno.EMFILE: "raise the limit (`ulimit -n`), or use fewer data.num_workers",
    errno.ENFILE: "raise the machine's limit (fs.file-max), or use fewer data.num_workers",
    errno.EAGAIN: "raise the limit of processes (`ulimit -u`), or use fewer data.num_workers",
    errno.ENOMEM: "they take more memory than there is: use fewer data.num_workers",
    errno.ENOSPC: _MORE_SHM,
    **dict.fromkeys(
        (errno.EACCES, errno.ENOENT, errno.EROFS), "let /dev/shm be writable shared memory, or set data.num_workers=0"
    ),
}
"""Remedies for errors of the workers' queues, processes and shared memory."""
_AHEAD_TOKENS = 1 << 18
"""Tokens per task of the read-ahead thread: a millisecond of work, against which the handover is cheap."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of L tokens end to end: T = sequences x L."""

    tokens_T: Tensor
    """(T,) int64."""
    targets_T: Tensor
    """(T,) int64, the next tokens, or IGNORED_TARGET."""
    bounds: tuple[int, ...]
    """0, the start of each further sequence, piece or document, and T."""
    sequences: int


class SequenceDataset(Dataset[MicroBatch]):
    """Maps positions to their sequences, end to end."""

    def __init__(self, corpora: Sequence[Corpus], plan: Plan, document_mask: bool):
        self.corpora = corpora
        self._plan = plan
        self._document_mask = document_mask
        self._bos_id = corpora[0].manifest.bos_id
        self._bos_is_eos = self._bos_id == corpora[0].manifest.eos_id
        self._chunk = Chunk(start=0, stop=0, seq_len=0, sources=[], pieces=[])

    def __len__(self) -> int:
        """Sequences in one pass over all sources."""
        return self._plan.n_sequences

    def __getitem__(self, positions: Sequence[int]) -> MicroBatch:
        """Reads the sequences at `positions`, which must all have the same length."""
        seq_len = self._around(positions[0]).seq_len
        size = len(positions) * seq_len
        tokens_T = torch.empty(size, dtype=torch.int64)
        targets_T = torch.empty(size, dtype=torch.int64)
        tokens, targets = tokens_T.numpy(), targets_T.numpy()
        joints: list[int] = []
        for row, position in enumerate(positions):
            chunk = self._around(position)
            assert chunk.seq_len == seq_len, (positions, seq_len, chunk.seq_len)
            offset = position - chunk.start
            corpus = self.corpora[chunk.sources[offset]]
            at, end = row * seq_len, (row + 1) * seq_len
            for start, count in chunk.pieces[offset]:
                stored = corpus.view(start, count + 1)
                joints.append(at)
                tokens[at : at + count] = stored[:-1]
                targets[at : at + count] = stored[1:]
                at += count
            if at < end:
                # Padding attends to nothing else: it is a document of its own.
                joints.append(at)
                tokens[at:end] = 0
                targets[at:end] = IGNORED_TARGET
        bounds = {*joints, size}
        if self._document_mask:
            # Each document starts with bos, which must not be a target. If bos is also eos, it ends documents too, but
            # only at a document's start does it follow another one.
            is_start = targets == self._bos_id
            if self._bos_is_eos:
                is_start &= tokens == self._bos_id
            (starts,) = is_start.nonzero()
            targets[starts] = IGNORED_TARGET
            bounds.update((starts + 1).tolist())
        return MicroBatch(tokens_T, targets_T, tuple(sorted(bounds)), len(positions))

    def seq_len_at(self, position: int) -> int:
        """Returns the tokens in the sequence at `position`."""
        return self._around(position).seq_len

    def count_tokens(self, positions: Sequence[int]) -> int:
        """Counts the tokens in these sequences, without padding."""
        total = 0
        for position in positions:
            chunk = self._around(position)
            total += sum(count for _, count in chunk.pieces[position - chunk.start])
        return total

    def bytes_per_target(self, positions: Sequence[int]) -> float:
        """Returns the bytes of text that a target in these sequences spells, by the mean of each source they read.

        A document's first token spells nothing and, with `document_mask`, is not a target.
        """
        tokens, text_bytes = 0, 0.0
        for position in positions:
            chunk = self._around(position)
            offset = position - chunk.start
            manifest = self.corpora[chunk.sources[offset]].manifest
            targets = manifest.tokens - (manifest.documents if self._document_mask else 1)
            count = sum(count for _, count in chunk.pieces[offset])
            tokens += count
            text_bytes += count * manifest.text_bytes / targets
        return text_bytes / max(1, tokens)

    def shards(self, source: int, positions: Sequence[int]) -> list[int]:
        """Returns, ascending, the numbers of the shards of corpus `source` that `positions` read."""
        pieces: list[Piece] = []
        for position in positions:
            chunk = self._around(position)
            offset = position - chunk.start
            if chunk.sources[offset] == source:
                pieces += chunk.pieces[offset]
        if not pieces:
            return []
        starts, counts = np.array(pieces, np.int64).T
        return self.corpora[source].shards_of(starts, counts + 1)

    def _around(self, position: int) -> Chunk:
        if not self._chunk.start <= position < self._chunk.stop:
            self._chunk = self._plan.chunk(position)
        return self._chunk


def batches(
    dataset: SequenceDataset,
    *,
    consumed_sequences: int,
    steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    local_ranks: int = 1,
) -> Iterator[MicroBatch]:
    """Yields the micro-batches of `dp_rank` for `steps` steps.

    Step s of this call reads `global_batch_size` positions from `consumed_sequences + s * global_batch_size`, every
    `dp_size`-th of them on this rank. Shards at URLs are prefetched within 1 / `local_ranks` of the cache. Raises
    DataError, from workers too, if a corpus is damaged.
    """
    share, rest = divmod(global_batch_size, dp_size)
    assert rest == 0 and share % micro_batch_size == 0, (global_batch_size, dp_size, micro_batch_size)
    stride = micro_batch_size * dp_size
    starts = range(consumed_sequences + dp_rank, consumed_sequences + steps * global_batch_size, stride)

    def positions() -> Iterator[range]:
        return (range(start, start + stride, dp_size) for start in starts)

    with ExitStack() as stack:
        # Before the prefetchers, since workers are forked, and threads do not survive a fork.
        micro_batches = _in_workers(dataset, positions(), num_workers) if num_workers else _ahead(dataset, positions())
        prefetchers = [stack.enter_context(each) for each in _prefetchers(dataset, positions, local_ranks)]
        for micro_batch in micro_batches:
            for prefetcher in prefetchers:
                prefetcher.next_step()
            yield micro_batch


def _ahead(dataset: SequenceDataset, positions: Iterator[range]) -> Iterator[MicroBatch]:
    """Reads the next groups of micro-batches in a thread during training on the current group."""
    first = next(positions, None)
    if first is None:
        return
    positions = chain([first], positions)
    size = max(1, _AHEAD_TOKENS // (len(first) * dataset.seq_len_at(first.start)))

    def read(group: list[range]) -> list[MicroBatch]:
        return [dataset[each] for each in group]

    with ThreadPoolExecutor(1, "read-ahead") as thread:
        groups = iter(lambda: list(islice(positions, size)), [])
        ahead = deque(thread.submit(read, group) for group in islice(groups, 2))
        while ahead:
            micro_batches = ahead.popleft().result()
            ahead.extend(thread.submit(read, group) for group in islice(groups, 1))
            yield from micro_batches


def _in_workers(dataset: SequenceDataset, positions: Iterator[range], num_workers: int) -> Iterator[MicroBatch]:
    loader = DataLoader(
        dataset,
        sampler=positions,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # by default it would draw from the global one
    )
    with _worker_errors():
        micro_batches = iter(loader)
    return _unwrapped(micro_batches)


def _unwrapped(micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    with _worker_errors():
        yield from micro_batches


@contextmanager
def _worker_errors() -> Iterator[None]:
    """Turns exceptions of workers, and of missing resources for them, into DataErrors."""
    try:
        yield
    except TriplaneError as error:
        # A worker's error arrives wrapped in its traceback.
        raise DataError(str(error).rstrip().rpartition(f"{DataError.__name__}: ")[2]) from error
    except RuntimeError as error:
        told = f"{error} {error.__cause__}"
        # The first are torch's words, where it has caught the OSError.
        if told.startswith("Too many open files") or f"exit code {_NO_FILE_LEFT}" in told:
            raise _lacking(errno.EMFILE) from error
        if f"exit code {_CANNOT_SEND}" not in told:
            raise
        raise DataError(f"a data worker could not hand over its batch, as its last line says: {_MORE_SHM}") from error
    except (EOFError, ConnectionError):
        # A worker was killed while sending; SIGCHLD will arrive, for which DataLoader raises an error that names it.
        time.sleep(1.0)
        raise
    except OSError as error:
        if error.errno not in _LACKS:
            raise
        raise _lacking(error.errno) from error


def _lacking(number: int) -> DataError:
    return DataError(f"data workers: {os.strerror(number)}: {_LACKS[number]}")


def _start_worker(worker: int) -> None:
    """Leaves signals to the rank, and exits if a batch cannot be sent, since the rank would wait for it forever."""
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    # Slurm and terminals signal every process, but the rank needs its data until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end_worker(error: Exception, batch: object) -> None:
    # In a single write, since other workers write too.
    sys.stderr.write(f"data worker {os.getpid()}: cannot send a batch: {error}\n")
    sys.stderr.flush()
    os._exit(_NO_FILE_LEFT if os.strerror(errno.EMFILE) in str(error) else _CANNOT_SEND)


def _unchanged(micro_batch: Any) -> Any:
    return micro_batch


def _prefetchers(
    dataset: SequenceDataset, positions: Callable[[], Iterator[range]], local_ranks: int
) -> list[Prefetcher]:
    """Returns a prefetcher per corpus at a URL; together they stay within this rank's share of the cache."""
    remote = [number for number, corpus in enumerate(dataset.corpora) if corpus.is_remote]
    prefetchers = []
    for number in remote:
        corpus, own = dataset.corpora[number], copy(dataset)  # each thread has its own position in the plan
        assert corpus.cache is not None
        budget_bytes = corpus.cache.limit_bytes // (local_ranks * len(remote))
        plan = map(partial(own.shards, number), positions())
        prefetchers.append(Prefetcher(corpus, plan, budget_bytes))
    return prefetchers
