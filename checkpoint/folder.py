"""Which checkpoints a folder holds, and how one comes, goes, and is passed over; each is whole or absent.

    step_100/          a checkpoint; .step_100.tmp is being written, .step_100.old deleted
    damaged_step_90/   was found damaged when a run resumed

At a URL, where nothing can be renamed at once, files are written to and deleted from step_100 itself: it is a
checkpoint while it has a manifest, which is written last and deleted first.
"""

from itertools import count
from pathlib import Path

from triplane.checkpoint.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from triplane.storage.errors import DamagedError
from triplane.storage.location import Location, entries, reaching, remove, rename, writing

_PREFIX, _DAMAGED = "step_", "damaged_"


def checkpoint_of(folder: Location, step: int) -> Location:
    """Where the checkpoint that is written after `step` lies."""
    return folder / f"{_PREFIX}{step}"


def step_of(checkpoint: Location) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.rpartition(_PREFIX)[2])


def checkpoints(folder: Location) -> list[Location]:
    """The checkpoints under `folder`, whole or damaged, oldest first."""
    found = _steps(folder)
    return found if isinstance(folder, Path) else [step for step in found if MANIFEST in entries(step)]


def latest(folder: Location) -> Location | None:
    """The newest checkpoint under `folder`, whole or damaged."""
    found = checkpoints(folder)
    return found[-1] if found else None


def newest_manifest(folder: Location) -> tuple[Location, Manifest] | None:
    """The newest checkpoint under `folder` whose manifest, and files' sizes, are as they were written."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_manifest(path)
        except DamagedError:
            continue  # the ranks name it and set it aside
    return None


def newest_step(folder: Location) -> int:
    """The step of the newest checkpoint under `folder`, whole or damaged; 0 if there is none."""
    newest = latest(folder)
    return step_of(newest) if newest else 0


def begin(folder: Location, step: int) -> Location:
    """Removes what killed saves have left, and makes a folder to write the files of a checkpoint to."""
    final = checkpoint_of(folder, step)
    for leftover in _leftovers(folder):
        remove(leftover)
    if entries(final):
        raise FileExistsError(f"{final} exists")
    if not isinstance(final, Path):
        return final
    temporary = final.with_name(f".{final.name}.tmp")
    temporary.mkdir(parents=True)
    return temporary


def commit(written: Location, manifest: Manifest) -> None:
    """Makes what was written to `written` a checkpoint."""
    write_manifest(written, manifest)
    if isinstance(written, Path):
        rename(written, written.stem.removeprefix("."))


def delete(checkpoint: Location) -> None:
    """Deletes it; killed half-way, it is no checkpoint, and the next save deletes the rest."""
    if isinstance(checkpoint, Path):
        remove(rename(checkpoint, f".{checkpoint.name}.old"))
        return
    with reaching(checkpoint):
        (checkpoint / MANIFEST).unlink()
    remove(checkpoint)


def set_aside(checkpoint: Location) -> Location:
    """Renames a damaged checkpoint, which is never deleted, so that no run takes it; returns its new place."""
    taken = entries(checkpoint.parent)
    names = (f"{_DAMAGED}{checkpoint.name}{'' if number == 1 else f'.{number}'}" for number in count(1))
    return rename(checkpoint, next(name for name in names if name not in taken))


def fresh_start_problem(folder: Location) -> str | None:
    """Why a run that finds no whole checkpoint under `folder` may not begin anew: there are damaged ones."""
    damaged = {name for name in entries(folder) if name.startswith(f"{_DAMAGED}{_PREFIX}")}
    damaged |= {checkpoint.name for checkpoint in checkpoints(folder)}
    if not damaged:
        return None
    return (
        f"{folder}: {', '.join(sorted(damaged))}: no checkpoint is whole; restore one from a copy, or let the run "
        f"begin anew by --allow-fresh-start"
    )


def write_problem(folder: Location) -> str | None:
    """Why nothing can be written to `folder`, found by writing."""
    probe = folder / ".probe"
    try:
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
        with writing(probe) as file:
            file.write(b"probe")
        with reaching(folder):
            probe.unlink()
    except OSError as error:
        return f"{folder}: no checkpoint can be written there: {error}"
    return None


def _steps(folder: Location) -> list[Location]:
    names = [name for name in entries(folder) if name.startswith(_PREFIX) and name[len(_PREFIX) :].isdecimal()]
    return sorted((folder / name for name in names), key=step_of)


def _leftovers(folder: Location) -> list[Location]:
    if isinstance(folder, Path):
        return list(folder.glob(f".{_PREFIX}*"))
    return [step for step in _steps(folder) if MANIFEST not in entries(step)]
