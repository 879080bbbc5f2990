"""`triplane train`: checks the run, then starts the ranks or runs as one."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from triplane.checkpoint.folder import write_problem
from triplane.config.checks import check
from triplane.config.load import load_config
from triplane.config.preflight import checkpoints_folder
from triplane.data.opening import open_sources
from triplane.launcher.streams import copy_errors
from triplane.parallel.devices import problems_of_devices, threads, use_cpu, visible_devices
from triplane.parallel.ranks import Rank, current_rank, rendezvous
from triplane.plan.gate import examine, memory_problem
from triplane.storage.errors import ConfigError, LaunchError, NoLocksError, StorageError, TriplaneError, counted
from triplane.storage.locks import locked_folder
from triplane.storage.open_files import open_files_problem
from triplane.training.config import RunConfig
from triplane.training.exits import Exit, leave
from triplane.training.failure import forget_failures
from triplane.training.stopping import LAUNCHER

_OWN_FILES = 48
_FILES_PER_RANK = 4
"""A rank has a socket to each other one in several groups."""


def train(
    path: Path, overrides: list[str], *, allow_data_change: bool, allow_fresh_start: bool, on_cpu: bool = False
) -> int:
    """Trains a run; returns the exit code."""
    if on_cpu:
        use_cpu()
    config = load_config(path, overrides)
    rank, run_dir = current_rank(os.environ), Path(config.run_dir)
    ranks = local_ranks(config) if rank is None else rank.world_size
    first = rank is None or rank.rank == 0
    watched = LAUNCHER in os.environ
    if not watched:
        found = list(machine_problems(config, rank, ranks))
        if first:
            with _unreadable_is_a_mistake():
                found = _pass_gate(
                    config,
                    ranks,
                    allow_data_change=allow_data_change,
                    allow_fresh_start=allow_fresh_start,
                    of_machine=found,
                    local=rank is None,
                )
        if found:
            if rank is not None:  # srun and torchrun may report the exit code of a rank that waited for this one
                config.folder.logs.mkdir(parents=True, exist_ok=True)
                config.folder.refused.write_text("\n".join(found) + "\n")
            raise ConfigError("\n".join(found))
        forget_failures(run_dir, rank.rank if rank else 0)
    if not watched and any(source.is_tars for source in config.data.sources):
        # Tokenizes them. Every process waits here, since the ranks wait for each other only up to a time limit.
        open_sources(config.data, config.folder.corpora)
    if rank is None and ranks > 1:
        allowed = {"--allow-data-change": allow_data_change, "--allow-fresh-start": allow_fresh_start}
        flags = [flag for flag, given in allowed.items() if given]
        arguments = ["train", str(path), *overrides, *flags]
        from triplane.launcher.local import run_local_ranks  # loads torch

        with alone_in(config.folder.logs):
            return run_local_ranks(
                ranks,
                arguments,
                run_dir,
                checkpoints=checkpoints_folder(config),
                max_restarts=config.faults.max_restarts,
            )
    if rank is not None and rank.world_size > 1:
        os.environ.update(rendezvous(os.environ))
    if rank is None:
        copy_errors(config.folder.new_logs([0])[0])
    if not first:
        os.dup2(2, 1)  # keeps what libraries print off the console, which is rank 0's
    from triplane.launcher.run import run_rank

    with _alone(config) if first else nullcontext():
        run_rank(config, rank or Rank(0, 1, 0), allow_fresh_start)
        leave(Exit.OK)
    return Exit.OK


@contextmanager
def _unreadable_is_a_mistake() -> Iterator[None]:
    """Raises StorageError for a file that cannot be read: in a rank that is a crash, before the start not."""
    try:
        yield
    except OSError as error:
        if isinstance(error, TriplaneError) or error.filename is None:
            raise
        raise StorageError(f"{error.filename}: {error.strerror}") from error


def _pass_gate(
    config: RunConfig,
    ranks: int,
    *,
    allow_data_change: bool,
    allow_fresh_start: bool,
    of_machine: list[str],
    local: bool,
) -> list[str]:
    """Returns all problems, including those `of_machine`; prints notes for the user if there are none.

    `local`: this process starts the ranks. Raises BusyError if another run is using the folders.
    """
    found = examine(config, ranks, allow_data_change=allow_data_change, allow_fresh_start=allow_fresh_start)
    if problems := [*found.problems, *of_machine]:
        return problems
    if problems := folder_problems(config, local=local):
        return problems
    for note in found.notes():
        print(f"triplane: {note}", flush=True)
    for source in config.data.sources:
        if source.is_tars:
            print(f"{source.corpus}: tokenized into {config.run_dir}/corpora unless it already is", flush=True)
    return []


def folder_problems(config: RunConfig, *, local: bool) -> list[str]:
    """Returns why nothing can be written or served, by trying; `local`: this process starts the ranks.

    Raises BusyError if another run is using the folders.
    """
    with _alone(config):
        if problem := write_problem(checkpoints_folder(config)):
            return [f"{problem}; set another checkpoint.folder or run_dir"]
        port = config.training.prometheus_port
        return list(_port_problems(port)) if local and port is not None else []


def machine_problems(config: RunConfig, rank: Rank | None, ranks: int) -> Iterator[str]:
    """Yields why this machine cannot run `rank`, or all ranks if `rank` is None and this process starts them."""
    try:
        threads(os.environ)
    except LaunchError as error:
        yield str(error)
    if problem := open_files_problem(_OWN_FILES + _FILES_PER_RANK * ranks):
        yield f"{counted(ranks, 'rank')}: {problem}"
    devices = visible_devices()
    yield from problems_of_devices(config.parallel, config.training.precision, devices, rank=rank, ranks=ranks)
    if rank is not None:
        return
    if not devices.gpus and not check(config, ranks) and (problem := memory_problem(config, ranks)):
        yield problem


@contextmanager
def _alone(config: RunConfig) -> Iterator[None]:
    """Locks the run folder, and the checkpoint folder if that is elsewhere on a disk."""
    with ExitStack() as held:
        held.enter_context(alone_in(Path(config.run_dir)))
        if config.checkpoint.folder and isinstance(folder := checkpoints_folder(config), Path):
            held.enter_context(alone_in(folder))
        yield


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Locks a folder, as two runs in it would overwrite each other's files."""
    with ExitStack() as held:
        try:
            held.enter_context(locked_folder(run_dir, wait=False))
        except NoLocksError as error:
            print(f"triplane: {error}: make sure not to start a second run in this folder", file=sys.stderr)
        yield


def _port_problems(port: int) -> Iterator[str]:
    """Yields why rank 0 could not serve its metrics at this port."""
    from triplane.training.prometheus import Endpoint  # few runs need it

    try:
        Endpoint(port).close()
    except OSError as error:
        yield f"training.prometheus_port ({port}): {error.strerror}; set another"


def local_ranks(config: RunConfig) -> int:
    """Returns the number of ranks to start on this machine; with dp `auto` they use all GPUs."""
    one, dp = config.parallel.ranks_of_one, config.parallel.dp
    if dp != "auto":
        return one * dp
    from torch import cuda  # 2 s to import

    return one * max(1, cuda.device_count() // one)
