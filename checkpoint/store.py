"""Writes checkpoints of a run, while it trains on, so that each is whole or absent.

A thread of every rank writes its fragments into a temporary folder; when all have, rank 0 writes the manifest
and renames the folder. A kill at any moment leaves the earlier checkpoints as they were.
"""

import shutil
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

import torch.distributed as dist

from triplane.checkpoint.agreement import on_rank_0
from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.errors import DamagedError
from triplane.checkpoint.manifest import PREFIX, Box, Manifest, checkpoints, read_manifest, step_of, write_manifest
from triplane.checkpoint.retention import Kept, expendable
from triplane.checkpoint.snapshot import Snapshot
from triplane.checkpoint.tensors import write_tensors
from triplane.data.files import sync
from triplane.parallel.placement import Fragment

_SLOWEST_WRITE = timedelta(hours=1)
"""How long the first rank to have written waits for the last."""


@dataclass(frozen=True)
class Save:
    """A save that has ended."""

    step: int
    path: Path
    stall_s: float
    """How long training stood still for it on the slowest rank."""
    time_s: float
    """From its start until the checkpoint stood."""
    error: str | None
    """Why there is none."""


@dataclass(frozen=True)
class _Written:
    """What a rank tells rank 0 of its file."""

    boxes: list[Box]
    file: str
    bytes: int
    stall_s: float
    error: OSError | None


class CheckpointStore:
    """The checkpoints of one run. All ranks call its methods in the same order."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder = folder
        self.config = config
        # The threads' own: a group serves one thread at a time.
        self._group = dist.new_group(backend="gloo", timeout=_SLOWEST_WRITE)
        self._snapshot = Snapshot()
        self._thread: Thread | None = None
        self._ended: deque[Save | Exception] = deque()
        self._losses: dict[int, float | None] = {}

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> None:
        """Begins to write `step_<step>` from the fragments of all ranks; when it returns, they may change.

        Waits for the save before it, and for its own end if it is not to be asynchronous.
        """
        start_s = perf_counter()
        self._wait()
        mine = [fragment for fragment in fragments if fragment.primary]
        if self.config.asynchronous:
            mine = self._snapshot.take(mine)
        # A daemon, since at the end of a failed run the other ranks may never answer.
        self._thread = Thread(
            target=self._run, args=(step, mine, state, start_s, perf_counter() - start_s), daemon=True
        )
        self._thread.start()
        if not self.config.asynchronous:
            self._wait()

    def ended(self, wait: bool = False) -> list[Save]:
        """The saves that have ended since the last call, with `wait` the one in flight too.

        A save ends alike on all ranks, but not at the same moment. Raises what went wrong in this rank's thread
        other than writing files.
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

    def _run(self, step: int, fragments: list[Fragment], state: dict[str, Any], start_s: float, stall_s: float) -> None:
        final = self.folder / f"{PREFIX}{step}"
        temporary = self.folder / f".{final.name}.tmp"
        error = None
        try:
            stall_s = self._write(final, temporary, fragments, state, stall_s)
            time_s = perf_counter() - start_s
            on_rank_0(self._delete_old, self._group)
        except OSError as caught:
            time_s, error = perf_counter() - start_s, _explain(caught, final)
        except Exception as caught:  # raised again by `ended`
            self._ended.append(caught)
            return
        self._ended.append(Save(step, final, stall_s if self.config.asynchronous else time_s, time_s, error))

    def _write(
        self, final: Path, temporary: Path, fragments: Sequence[Fragment], state: dict[str, Any], stall_s: float
    ) -> float:
        """Returns the longest stall, on all ranks; an OSError of one is raised on all."""
        sizes = self._on_rank_0_gathered(sum(fragment.data.nbytes for fragment in fragments))
        on_rank_0(lambda: _make_room(temporary, sum(sizes)), self._group)
        path = temporary / f"rank_{dist.get_rank()}.safetensors"
        try:
            boxes = write_tensors(path, fragments)
            written = _Written(boxes, path.name, path.stat().st_size if boxes else 0, stall_s, None)
        except OSError as error:
            written = _Written([], path.name, 0, stall_s, error)
        ranks = self._on_rank_0_gathered(written)
        return on_rank_0(lambda: self._commit(final, temporary, ranks, state), self._group)

    def _on_rank_0_gathered(self, mine: Any) -> list[Any]:
        """What all ranks give, on rank 0; an empty list on the others."""
        gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, gathered, group=self._group)
        return gathered or []

    def _commit(self, final: Path, temporary: Path, ranks: list[_Written], state: dict[str, Any]) -> float:
        boxes = [box for rank in ranks for box in rank.boxes]
        manifest = Manifest(state, boxes, {rank.file: rank.bytes for rank in ranks if rank.bytes})
        try:
            for rank in ranks:
                if rank.error:
                    raise rank.error
            commit(temporary, final, manifest)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._losses[step_of(final)] = state.get("validation_loss")
        return max(rank.stall_s for rank in ranks)

    def _delete_old(self) -> None:
        found = {step_of(path): path for path in checkpoints(self.folder)}
        if self.config.keep_best:
            for step in found.keys() - self._losses.keys():  # written before this process began
                self._losses[step] = _loss_of(found[step])
        for step in expendable((Kept(step, self._losses.get(step)) for step in found), self.config):
            # Renamed first: killed half-way, it is no checkpoint.
            found[step].rename(self.folder / f".{found[step].name}.old")
        for leftover in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(leftover)


def _loss_of(checkpoint: Path) -> float | None:
    try:
        loss: float | None = read_manifest(checkpoint).state.get("validation_loss")
    except DamagedError:
        return None  # no rule keeps it for its loss
    return loss


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Makes a folder of written files the checkpoint `final`."""
    write_manifest(temporary, manifest)
    if final.exists():
        final.rename(final.with_name(f".{final.name}.old"))
    temporary.rename(final)
    sync(final.parent)


def _make_room(temporary: Path, needed: int) -> None:
    """Removes what killed saves have left, and makes the folder if there is space for `needed` bytes."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover)
    free = shutil.disk_usage(temporary.parent).free
    if needed > free:
        raise OSError(f"{needed:,} bytes needed, {free:,} free")
    temporary.mkdir()


def _explain(error: OSError, final: Path) -> str:
    return f"cannot write {final}: {error}; earlier checkpoints are untouched; make room, or set another run_dir"
