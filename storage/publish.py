"""Publishes a folder whole or not at all, and removes what killed commands have left of theirs."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from triplane.storage.errors import BusyError, CheckpointError, NoLocksError, TriplaneError
from triplane.storage.files import locked_folder, sync
from triplane.storage.foreign import refuse_unprintable

_SUFFIX = ".triplane-partial"


def refuse_existing(out: Path) -> None:
    """Raises CheckpointError if something has the name `out`, or if it is no text."""
    refuse_unprintable(out)
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists; remove it or give another folder.")


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which gets the name `out` when the block has ended, and is removed if it fails.

    So are the folders above it that were made for it. What a killed command has left beside `out` is removed first;
    that of a living one is locked. Raises CheckpointError if `out` exists, or if it cannot be written.
    """
    refuse_existing(out)
    hidden = out.parent / f".{out.name[:100]}-{uuid4().hex[:8]}{_SUFFIX}"
    try:
        with ExitStack() as held:
            held.enter_context(_made(out.parent))
            for leftover in out.parent.glob(f".*{_SUFFIX}"):
                _remove_unless_held(leftover)
            try:
                with suppress(NoLocksError):  # where nothing can be locked, no command removes another's
                    held.enter_context(locked_folder(hidden, wait=False))
                folder = hidden / out.name
                folder.mkdir(parents=True)
                yield folder
                os.rename(folder, out)
                sync(out.parent)
            finally:  # while it is locked, so that no other command takes it for a leftover
                shutil.rmtree(hidden, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise CheckpointError(f"{out}: cannot be written: {reason}; make room, or give another folder") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes `folder` and those above it; if the block fails they go again, but for any that hold something."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for path in absent:
                path.rmdir()
        raise


def _remove_unless_held(leftover: Path) -> None:
    try:
        with locked_folder(leftover, wait=False):
            shutil.rmtree(leftover)
            print(f"{leftover}: left by a command that was killed; removed")
    except (BusyError, NoLocksError):
        pass
    except (TriplaneError, OSError) as error:  # another user's, perhaps
        print(f"{leftover}: left by a command that was killed; it could not be removed: {error}")
