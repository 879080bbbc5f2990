"""Lists, creates, deletes and sets aside the checkpoints of a folder; each is whole or absent.

    step_100/          a checkpoint; .step_100.tmp is being written, .step_100.old deleted
    damaged_step_90/   found damaged when a run resumed

At a URL, where renames are not atomic, files are written to and deleted from step_100 itself: it is a checkpoint
while it has a manifest, which is written last and deleted first.
"""

from itertools import count
from pathlib import Path

from triplane.checkpoint.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from triplane.storage.errors import DamagedError
from triplane.storage.location import Location, entries, reaching, remove, rename, writing

_PREFIX, _DAMAGED = "step_", "damaged_"


def checkpoint_of(folder: Location, step: int) -> Location:
    """Returns the place of the checkpoint of `step`."""
    return folder / f"{_PREFIX}{step}"


def step_of(checkpoint: Location) -> int:
    """Returns the step of a checkpoint, from its name."""
    return int(checkpoint.name.rpartition(_PREFIX)[2])


def checkpoints(folder: Location) -> list[Location]:
    """Returns the checkpoints under `folder`, whole or damaged, oldest first."""
    found = _steps(folder)
    return found if isinstance(folder, Path) else [step for step in found if MANIFEST in entries(step)]


def latest(folder: Location) -> Location | None:
    """Returns the newest checkpoint under `folder`, whole or damaged."""
    found = checkpoints(folder)
    return found[-1] if found else None


def newest_manifest(folder: Location) -> tuple[Location, Manifest] | None:
    """Returns the newest checkpoint under `folder` with an intact manifest and files of the right size."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_manifest(path)
        except DamagedError:
            continue  # the ranks name it and set it aside
    return None


def newest_step(folder: Location) -> int:
    """Returns the step of the newest checkpoint under `folder`, whole or damaged; 0 without one."""
    newest = latest(folder)
    return step_of(newest) if newest else 0


def begin(folder: Location, step: int) -> Location:
    """Removes what killed saves left behind, and creates a folder for the files of a checkpoint."""
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
    """Turns the files in `written` into a checkpoint."""
    write_manifest(written, manifest)
    if isinstance(written, Path):
        rename(written, written.stem.removeprefix("."))


def delete(checkpoint: Location) -> None:
    """Deletes a checkpoint; if killed half-way, it no longer is one, and the next save deletes the rest."""
    if isinstance(checkpoint, Path):
        remove(rename(checkpoint, f".{checkpoint.name}.old"))
        return
    with reaching(checkpoint):
        (checkpoint / MANIFEST).unlink()
    remove(checkpoint)


def set_aside(checkpoint: Location) -> Location:
    """Renames a damaged checkpoint, rather than deleting it, so that no run uses it; returns its new place."""
    taken = entries(checkpoint.parent)
    names = (f"{_DAMAGED}{checkpoint.name}{'' if number == 1 else f'.{number}'}" for number in count(1))
    return rename(checkpoint, next(name for name in names if name not in taken))


def fresh_start_problem(folder: Location) -> str | None:
    """Returns why a run without a whole checkpoint under `folder` may not start fresh: there are damaged ones."""
    damaged = {name for name in entries(folder) if name.startswith(f"{_DAMAGED}{_PREFIX}")}
    damaged |= {checkpoint.name for checkpoint in checkpoints(folder)}
    if not damaged:
        return None
    return (
        f"{folder}: {', '.join(sorted(damaged))}: no checkpoint is whole; restore one from a copy, or start "
        f"fresh with --allow-fresh-start"
    )


def write_problem(folder: Location) -> str | None:
    """Returns why nothing can be written to `folder`, by trying."""
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
