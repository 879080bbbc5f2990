"""Checks the run folder and its checkpoints: where they are, which run they belong to, whether a run may resume."""

import tomllib
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from triplane.checkpoint.folder import fresh_start_problem, latest, newest_manifest
from triplane.checkpoint.kept_tokenizer import KeptTokenizer, kept_tokenizer
from triplane.checkpoint.manifest import MANIFEST, read_manifest
from triplane.checkpoint.parent import Parent
from triplane.config.data_change import DataChange, data_change
from triplane.data.opening import Sources
from triplane.model.config import ModelConfig
from triplane.model.describe import model_weights
from triplane.storage.errors import CheckpointError
from triplane.storage.files import write_whole
from triplane.storage.foreign import first_problem
from triplane.storage.location import Location, entries, location, read
from triplane.training.config import RunConfig
from triplane.training.run_folder import CHECKPOINTS, CONFIG, RunFolder

_FIXED = (
    "seed",
    "model",
    "data.seq_len",
    "data.document_mask",
    "data.shuffle_window",
    "data.packing",
    "data.lanes",
)
"""Keys that may not change when a run resumes: they determine the weights' shapes and the order of the data."""

T = TypeVar("T", bound=BaseModel)


class BesideConfig(BaseModel, strict=True):
    """The keys of a `run_record` besides the config."""

    corpus_digests: list[str] = []
    tokenizer: KeptTokenizer | None = None
    parent: Parent | None = None
    id: str | None = None
    """The run's id, independent of its folder's name; None in checkpoints from before runs had ids."""


class _CheckpointFolder(BaseModel, strict=True):
    folder: str | None = None


def check_run_dir(
    config: RunConfig, record: dict[str, Any], *, allow_data_change: bool, allow_fresh_start: bool
) -> list[str]:
    """Returns why the run cannot resume: its newest checkpoint is another run's or read other data; all are damaged."""
    try:
        folder = checkpoints_folder(config)
        found = newest_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    if found is None:
        problem = None if allow_fresh_start else fresh_start_problem(folder)
        return [problem] if problem else list(_check_initial(config))
    newest, state = found[0], found[1].state
    try:
        saved = config_of(state["run"], newest)
    except CheckpointError as error:
        return [str(error)]
    # Read anew, since an older version spelled the same network in other keys.
    theirs, ours = flatten(state["run"] | {"model": saved.model.model_dump(mode="json")}), flatten(record)
    keys = sorted(theirs.keys() | ours.keys())
    differing = [key for key in keys if key.startswith(_FIXED) and theirs.get(key) != ours.get(key)]
    problems = [
        f"{newest} belongs to another run: {key} is {theirs.get(key)} there and {ours.get(key)} here; "
        f"set another run_dir, or delete {config.run_dir} to start over"
        for key in differing
    ]
    problems += _another_run(config, newest, state["run"])
    problems += _phase_problems(config, newest, state)
    problems += _optimizer_problems(config, newest, saved)
    change = change_since(state, record)
    problems += [f"{newest}: {line}" for line in change.refused]
    if not allow_data_change:
        problems += [
            f"{newest}: {line}; restore the corpus, or resume with the new one by --allow-data-change"
            for line in change.replaced
        ]
    return problems


def _another_run(config: RunConfig, newest: Location, theirs: dict[str, Any]) -> Iterator[str]:
    """Yields a problem if another run writes to `checkpoint.folder`; without one, checkpoints move with the run."""
    if config.checkpoint.folder is None:
        return
    ours, named = _read_id(Path(config.run_dir)), theirs["run_dir"]
    same = ours == theirs.get("id") if ours and theirs.get("id") else named == config.run_dir
    if not same:
        yield (
            f"{newest} belongs to the run {named}, not to {config.run_dir}: set another checkpoint.folder; to start "
            f"from its weights, also set checkpoint.initial={newest}; to resume it, set run_dir={named}"
        )


def _phase_problems(config: RunConfig, newest: Location, state: dict[str, Any]) -> Iterator[str]:
    """Yields later phases that change the sequence length within a step, counted from the checkpoint."""
    training, consumed, done = config.training, state["consumed_sequences"], state["step"]
    for number, phase in enumerate(config.data.phases):
        start = phase.from_sequence
        step = training.updates(max(0, start - consumed), done)
        if start in config.data.length_changes and step.denominator > 1:
            yield (
                f"data.phases[{number}]: seq_len changes at from_sequence ({start}), within a step: after {newest} the "
                f"next begins at {consumed + training.sequences(done + ceil(step), done)}"
            )


def _optimizer_problems(config: RunConfig, newest: Location, saved: RunConfig) -> Iterator[str]:
    """Yields what the optimizer needs of its state that the one which wrote the checkpoint does not keep."""
    ours, theirs = config.optimizer, saved.optimizer
    weights = model_weights(config.model).values()
    absent = sorted(
        {name for weight in weights for name in ours.moments(weight).keys() - theirs.moments(weight).keys()}
    )
    if ours.average_decay is not None and theirs.average_decay is None:
        absent.append("average")
    if absent:
        yield (
            f"{newest} holds no {', '.join(absent)}, which [optimizer] asks for and the run's did not (its kind is "
            f"{theirs.kind}); set it to what it was, or start from the weights alone: set another run_dir, and "
            f"checkpoint.initial={newest}"
        )


def own_id(config: RunConfig) -> str:
    """Returns the run's id from its folder, else from its checkpoints, else a new one."""
    run_dir = Path(config.run_dir)
    if known := _read_id(run_dir):
        return known
    found = newest_manifest(checkpoints_folder(config))
    known = (found[1].state["run"].get("id") if found else None) or uuid4().hex
    write_whole(config.folder.run_id, f"{known}\n".encode())
    return known


def _read_id(run_dir: Path) -> str | None:
    path = RunFolder(run_dir).run_id
    return path.read_text(errors="replace").strip() if path.exists() else None


def checkpoints_folder(config: RunConfig) -> Location:
    """Returns the folder of the run's checkpoints."""
    return location(config.checkpoint.folder or f"{config.run_dir}/{CHECKPOINTS}")


def done_steps(config: RunConfig) -> int:
    """Returns the step that the run would resume from; 0 if none is readable, which `check_run_dir` reports."""
    try:
        newest = newest_manifest(checkpoints_folder(config))
    except CheckpointError:
        return 0
    return int(newest[1].state["step"]) if newest else 0


def find_checkpoint(text: str) -> Location:
    """Finds the checkpoint at a path or URL, or the newest in a run folder or a folder of checkpoints."""
    place = location(text)
    found = entries(place)
    if MANIFEST in found:
        return place
    elsewhere = None
    if CONFIG in found:
        elsewhere = _configured_folder(place / CONFIG)
    if elsewhere:
        place = location(elsewhere)
    elif CHECKPOINTS in found:
        place /= CHECKPOINTS
    if (newest := latest(place)) is None:
        raise CheckpointError(f"{text}: neither a checkpoint nor a run folder with one; train or import first")
    return newest


def _configured_folder(path: Location) -> str | None:
    """Reads `checkpoint.folder` from the config of a run."""
    try:
        config = tomllib.loads(read(path).decode())
        return _CheckpointFolder.model_validate(config.get("checkpoint", {})).folder
    except ValidationError as error:
        raise CheckpointError(f"{path}: checkpoint.{first_problem(error)}") from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: not TOML: {error}") from error


def _check_initial(config: RunConfig) -> Iterator[str]:
    """Yields problems with the initial weights: missing, or of another network."""
    initial = config.checkpoint.initial
    if initial is None:
        return
    try:
        found = find_checkpoint(initial)
        theirs = flatten(model_of(read_manifest(found).state["run"], found).model_dump(mode="json"))
        parent_of(initial)
    except CheckpointError as error:
        yield f"checkpoint.initial: {error}"
        return
    ours = flatten(config.model.model_dump(mode="json"))
    for key in sorted((theirs.keys() | ours.keys()) - {"init_std", "z_loss_weight"}):
        if theirs.get(key) != ours.get(key):
            yield (
                f"checkpoint.initial: {initial} has {key} {theirs.get(key)}, but model.{key} is {ours.get(key)}; make "
                f"them equal"
            )


def change_since(state: dict[str, Any], record: dict[str, Any]) -> DataChange:
    """Compares the data with that of the checkpoint with this state."""
    return data_change(state["run"], record, state["consumed_sequences"])


def run_record(config: RunConfig, sources: Sources) -> dict[str, Any]:
    """Returns what a checkpoint records about its run, except its id and parent."""
    return {
        **config.model_dump(mode="json"),
        "corpus_digests": sources.digests,
        "tokenizer": kept_tokenizer(sources.tokenizer),
    }


def parent_of(initial: str) -> Parent:
    """Returns the model whose weights a run starts from: the one imported, or the run that trained it."""
    found = find_checkpoint(initial)
    record = read_manifest(found).state["run"]
    grandparent = beside_config(record, found).parent
    if "imported_from" in record and grandparent is not None:
        return grandparent
    licence = grandparent.licence if grandparent else None
    return Parent(name=str(record.get("run_dir", initial)), licence=licence, context=_context_of(record, found))


def _context_of(record: dict[str, Any], where: Location) -> int | None:
    return None if "imported_from" in record else max(n for _, _, n in config_of(record, where).data.timeline())


def beside_config(record: dict[str, Any], where: Location) -> BesideConfig:
    """Reads the keys besides the config from the record of a run or an import; raises CheckpointError."""
    return _of_this_version(BesideConfig, record, where)


def config_of(record: dict[str, Any], where: Location) -> RunConfig:
    """Reads the config from the `run_record` of checkpoint `where`; raises CheckpointError if it is incompatible."""
    beside_config(record, where)
    content = {key: value for key, value in record.items() if key not in BesideConfig.model_fields}
    return _of_this_version(RunConfig, content, where)


def model_of(record: dict[str, Any], where: Location) -> ModelConfig:
    """Reads the network from the record of a run or an import; raises CheckpointError."""
    return _of_this_version(ModelConfig, record.get("model"), where)


def _of_this_version(schema: type[T], content: object, where: Location) -> T:
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(
            f"{where}: written by another version of triplane: {first_problem(error)}; use that version"
        ) from error


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested tables into one with keys such as `outer.inner`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
