"""Writes checkpoints while training continues, so that each is whole or absent.

A thread on every rank writes its fragments; then rank 0 writes the manifest, which makes their files a checkpoint.
A kill at any moment leaves earlier checkpoints untouched.
"""

import shutil
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.folder import begin, checkpoint_of, checkpoints, commit, delete, step_of
from triplane.checkpoint.kept_tokenizer import write_tokenizer
from triplane.checkpoint.manifest import Box, Manifest, read_manifest
from triplane.checkpoint.retention import Kept, expendable
from triplane.checkpoint.snapshot import Snapshot, last_change
from triplane.checkpoint.tensors import write_tensors
from triplane.data.tokenizer import Tokenizer
from triplane.parallel.placement import Fragment
from triplane.parallel.rank_0 import on_rank_0
from triplane.storage.errors import DamagedError
from triplane.storage.location import Location, remove

_SLOWEST_WRITE = timedelta(hours=1)
"""How long the first rank to finish waits for the last."""


@dataclass(frozen=True)
class Save:
    """A finished save."""

    step: int
    path: Location
    stall_s: float
    """How long it stalled training on the slowest rank."""
    time_s: float
    """From its start until the checkpoint was complete."""
    error: str | None
    """Why it failed; None if it succeeded."""


@dataclass(frozen=True)
class _Written:
    """A rank's report to rank 0 about its file."""

    file: str
    boxes: list[Box]
    bytes: int
    stall_s: float
    error: OSError | None


class CheckpointStore:
    """The checkpoints of one run. All ranks call its methods in the same order."""

    def __init__(self, folder: Location, config: CheckpointConfig, tokenizer: Tokenizer | None = None):
        """Each checkpoint holds the files of `tokenizer`."""
        self.folder = folder
        self._tokenizer = tokenizer
        self.config = config
        # For the threads alone, since a group serves one thread at a time.
        self._group = dist.new_group(backend="gloo", timeout=_SLOWEST_WRITE)
        self._snapshot = Snapshot()
        self._thread: Thread | None = None
        self._copied = Event()
        self._copied.set()
        self._stall_s = 0.0
        self._ended: deque[Save | Exception] = deque()
        self._losses: dict[int, float | None] = {}

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> None:
        """Starts writing the checkpoint of `step` from the fragments of all ranks.

        The fragments may change only after `wait_until_copied`. Waits for the previous save, and for its own end
        unless saves are asynchronous.
        """
        start_s = perf_counter()
        self._wait()
        mine = [fragment for fragment in fragments if fragment.primary]
        changed = last_change(mine)
        if self.config.asynchronous:
            self._copied.clear()
        self._stall_s = perf_counter() - start_s
        # A daemon, since the other ranks of a failed run may never answer.
        save = partial(self._run, step, mine, state, changed=changed, start_s=start_s)
        self._thread = Thread(target=save, daemon=True)
        self._thread.start()
        if not self.config.asynchronous:
            self._wait()

    def wait_until_copied(self) -> None:
        """Waits until the save in flight no longer needs the fragments."""
        start_s = perf_counter()
        self._copied.wait()
        self._stall_s += perf_counter() - start_s

    def ended(self, wait: bool = False) -> list[Save]:
        """Returns the saves that ended since the last call; with `wait`, also the one in flight.

        A save ends with the same result on all ranks, but not at the same moment. Raises any error of this rank's
        thread other than from writing files.
        """
        if wait:
            self._wait()
        saves = []
        while self._ended:
            save = self._ended.popleft()
            if isinstance(save, Exception):
                raise save
            saves.append(save)
        return saves

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(
        self,
        step: int,
        fragments: list[Fragment],
        state: dict[str, Any],
        *,
        changed: torch.cuda.Event | None,
        start_s: float,
    ) -> None:
        final = checkpoint_of(self.folder, step)
        stall_s, error = 0.0, None
        try:
            if self.config.asynchronous:
                fragments = self._copy(fragments, changed)
            stall_s = self._write(step, fragments, state)
            time_s = perf_counter() - start_s
            on_rank_0(self._delete_old, self._group)
        except OSError as caught:
            time_s, error = perf_counter() - start_s, _explain(caught, final)
        except Exception as caught:  # raised again by `ended`
            self._ended.append(caught)
            return
        if not self.config.asynchronous:
            stall_s = time_s
        self._ended.append(Save(step=step, path=final, stall_s=stall_s, time_s=time_s, error=error))

    def _copy(self, fragments: Sequence[Fragment], changed: torch.cuda.Event | None) -> list[Fragment]:
        try:
            return self._snapshot.take(fragments, changed)
        finally:
            self._copied.set()

    def _write(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> float:
        """Writes the checkpoint; returns the longest stall, and raises an OSError of one rank on all."""
        sizes = self._on_rank_0_gathered(sum(fragment.data.nbytes for fragment in fragments))
        folder = on_rank_0(lambda: self._begin(step, sum(sizes)), self._group)
        path = folder / f"rank_{dist.get_rank()}.safetensors"
        try:
            boxes, size = write_tensors(path, fragments)
            written = _Written(file=path.name, boxes=boxes, bytes=size, stall_s=self._stall_s, error=None)
        except OSError as error:
            written = _Written(file=path.name, boxes=[], bytes=0, stall_s=self._stall_s, error=error)
        ranks = self._on_rank_0_gathered(written)
        return on_rank_0(lambda: self._commit(folder, step, state, ranks=ranks), self._group)

    def _on_rank_0_gathered(self, mine: Any) -> list[Any]:
        """Returns every rank's value on rank 0; an empty list on the others."""
        gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, gathered, group=self._group)
        return gathered or []

    def _begin(self, step: int, needed: int) -> Location:
        """Creates a folder; raises OSError unless it has room for `needed` bytes of tensors and the tokenizer."""
        folder = begin(self.folder, step)
        if self._tokenizer is not None:
            needed += sum(map(len, self._tokenizer.files.values()))
        if isinstance(folder, Path) and needed > (free := shutil.disk_usage(folder).free):
            remove(folder)
            raise OSError(f"{needed:,} bytes needed, {free:,} free")
        return folder

    def _commit(self, folder: Location, step: int, state: dict[str, Any], *, ranks: list[_Written]) -> float:
        boxes = [box for rank in ranks for box in rank.boxes]
        sizes = {rank.file: rank.bytes for rank in ranks if rank.bytes}
        try:
            for rank in ranks:
                if rank.error:
                    raise rank.error
            if self._tokenizer is not None:
                sizes |= write_tokenizer(self._tokenizer, folder)
            commit(folder, Manifest(state, boxes, sizes))
        except OSError:
            with suppress(OSError):  # the next save removes what is left
                remove(folder)
            raise
        self._losses[step] = state.get("validation_loss")
        return max(rank.stall_s for rank in ranks)

    def _delete_old(self) -> None:
        found = {step_of(path): path for path in checkpoints(self.folder)}
        if self.config.keep_best:
            for step in found.keys() - self._losses.keys():  # written before this process began
                self._losses[step] = _loss_of(found[step])
        for step in expendable((Kept(step, self._losses.get(step)) for step in found), self.config):
            delete(found[step])


def _loss_of(checkpoint: Location) -> float | None:
    try:
        return read_manifest(checkpoint).state.get("validation_loss")
    except DamagedError:
        return None  # no rule keeps it for its loss


def _explain(error: OSError, final: Location) -> str:
    advice = "make room, or set another run_dir" if isinstance(final, Path) else "see that it can be written to"
    return f"cannot write {final}: {error}; earlier checkpoints are untouched; {advice}"
