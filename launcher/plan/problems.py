"""Everything that can be known to be wrong with a run, on any machine that sees its files."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from triplane.checkpoint.errors import CheckpointError
from triplane.checkpoint.exportable import export_problems
from triplane.checkpoint.folder import newest_manifest
from triplane.data.config import DataConfig
from triplane.data.errors import DataError
from triplane.data.opening import Sources, open_sources
from triplane.data.remote import is_url
from triplane.data.sources import find_files
from triplane.launcher.checks import check
from triplane.launcher.config import RunConfig
from triplane.launcher.preflight import check_data, check_run_dir, checkpoints_folder, run_record
from triplane.model.count import count_parameters

_STATE_BYTES = 12
"""fp32 weight and two moments of each parameter."""


def problems(config: RunConfig, ranks: int) -> list[str]:
    """A line each, as `triplane train` would say it, and what it would find out later."""
    found = check(config, ranks)
    found += _tars(config.data)
    sources = None
    try:
        sources = _open(config)
    except DataError as error:
        found += str(error).splitlines()
    if sources is not None:
        found += check_data(config, sources) or check_run_dir(config, run_record(config, sources), False, False)
        found += [
            f"it could not be exported: {problem}" for problem in export_problems(config.model, sources.tokenizer)
        ]
    return found + list(_disk(config))


def done_steps(config: RunConfig) -> int:
    """Steps of the checkpoint that the run would go on from; none if none can be read, which is a problem too."""
    try:
        newest = newest_manifest(checkpoints_folder(config))
    except CheckpointError:
        return 0
    return int(newest[1].state["step"]) if newest else 0


def kept_checkpoints(config: RunConfig) -> int:
    """How many whole checkpoints there are at once at the most: those that the rules keep, and one being written."""
    rules, steps = config.checkpoint, config.training.steps
    saves = -(-steps // rules.every_steps)
    kept = rules.keep_last + rules.keep_best + (steps // rules.keep_every if rules.keep_every else 0)
    return min(saves, kept) + 1


def checkpoint_bytes(config: RunConfig) -> int:
    """Of one checkpoint."""
    return _STATE_BYTES * count_parameters(config.model)


def _open(config: RunConfig) -> Sources | None:
    """None while a source is tars, which become a corpus when training begins."""
    if any(source.is_tars for source in config.data.sources):
        return None
    return open_sources(config.data, Path(config.run_dir))


def _tars(data: DataConfig) -> Iterator[str]:
    tars = [source.corpus for source in data.sources if source.is_tars]
    if tars and data.tokenizer is None:
        yield f"{tars[0]}: tars need data.tokenizer, the model file to tokenize them with"
    elif tars and data.tokenizer is not None and not Path(data.tokenizer).exists():
        yield f"data.tokenizer: {data.tokenizer}: no such file"
    try:
        find_files(tars, lambda rejection: None)
    except DataError as error:
        yield from str(error).splitlines()


def _disk(config: RunConfig) -> Iterator[str]:
    if is_url(config.checkpoint.folder):
        return
    folder = Path(str(checkpoints_folder(config)))
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    there = sum(file.stat().st_size for file in folder.glob("*/*"))
    free = shutil.disk_usage(disk).free + there
    one, count = checkpoint_bytes(config), kept_checkpoints(config)
    if one * count > free:
        yield (
            f"{folder}: {count} checkpoints of {one / 2**30:,.1f} GiB (those that checkpoint.keep_last, keep_every and "
            f"keep_best name, and one being written) need {one * count / 2**30:,.1f} GiB, but {free / 2**30:,.1f} GiB "
            f"are free; keep fewer, or set checkpoint.folder to a larger disk"
        )
