"""Publishes folders atomically, and removes the leftovers of killed commands."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from triplane.storage.errors import BusyError, CheckpointError, NoLocksError, TriplaneError
from triplane.storage.files import sync
from triplane.storage.foreign import refuse_unprintable
from triplane.storage.locks import locked_folder

_SUFFIX = ".triplane-partial"


def refuse_existing(out: Path) -> None:
    """Raises CheckpointError if `out` exists or is not UTF-8."""
    refuse_unprintable(out)
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists; remove it or give another folder.")


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """Yields a hidden folder, renamed to `out` when the block ends; if it fails, removes it and the parents it created.

    First removes what killed commands left beside `out`; a running command holds a lock on its folder. Raises
    CheckpointError if `out` exists or cannot be written.
    """
    refuse_existing(out)
    hidden = out.parent / f".{out.name[:100]}-{uuid4().hex[:8]}{_SUFFIX}"
    try:
        with ExitStack() as held:
            held.enter_context(_made(out.parent))
            for leftover in out.parent.glob(f".*{_SUFFIX}"):
                _remove_unless_held(leftover)
            try:
                with suppress(NoLocksError):  # without locks, no command removes another's folder
                    held.enter_context(locked_folder(hidden, wait=False))
                folder = hidden / out.name
                folder.mkdir(parents=True)
                yield folder
                os.rename(folder, out)
                sync(out.parent)
            finally:  # under the lock, so that no other command takes it for a leftover
                shutil.rmtree(hidden, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise CheckpointError(f"{out}: cannot be written: {reason}; make room, or give another folder") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Creates `folder` and its parents; if the block fails, removes those it created, unless they are in use."""
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
