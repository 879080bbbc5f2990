"""`triplane train`: checks everything that can be known, then starts ranks or is one."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from triplane.checkpoint.folder import write_problem
from triplane.data.errors import DataError, NoLocksError
from triplane.data.files import locked_folder
from triplane.data.opening import open_sources
from triplane.launcher.checks import check
from triplane.launcher.config import RunConfig, load_config
from triplane.launcher.devices import problems_of_devices, use_cpu, visible_devices
from triplane.launcher.errors import ConfigError
from triplane.launcher.preflight import check_data, check_run_dir, checkpoints_folder, run_record
from triplane.launcher.ranks import Rank, current_rank, rendezvous
from triplane.training.failure import forget_failures


def train(
    path: Path, overrides: list[str], allow_data_change: bool, allow_fresh_start: bool, on_cpu: bool = False
) -> int:
    """Trains what the config says; returns the exit code."""
    if on_cpu:
        use_cpu()
    config = load_config(path, overrides)
    rank = current_rank(os.environ)
    forget_failures(Path(config.run_dir), rank.rank if rank else 0)
    ranks = _local_ranks(config) if rank is None else rank.world_size
    if rank is None or rank.rank == 0:
        for source in config.data.sources:
            if source.is_tars:
                print(
                    f"{source.corpus}: tokenized into {config.run_dir}/corpora unless it is there already", flush=True
                )
    found = problems(config, ranks, allow_data_change, allow_fresh_start)
    found += problems_of_devices(config, rank, ranks, visible_devices())
    if found:
        raise ConfigError("\n".join(found))
    if rank is None and config.training.prometheus_port is not None:
        _check_port(config.training.prometheus_port)
    run_dir, first = Path(config.run_dir), rank is None or rank.rank == 0
    if first:
        with alone_in(run_dir):
            _check_writing(config)
    if rank is None and ranks > 1:
        allowed = {"--allow-data-change": allow_data_change, "--allow-fresh-start": allow_fresh_start}
        flags = [flag for flag, given in allowed.items() if given]
        arguments = ["train", str(path), *overrides, *flags]
        from triplane.launcher.local import run_local_ranks  # loads torch

        return run_local_ranks(ranks, arguments, run_dir, checkpoints_folder(config), config.faults.max_restarts)
    if rank is not None and rank.world_size > 1:
        os.environ.update(rendezvous(os.environ))
    if not first:
        os.dup2(2, 1)  # what libraries print; the console is rank 0's
    from triplane.launcher.cli import leave
    from triplane.launcher.run import run_rank

    with alone_in(run_dir) if first else nullcontext():
        run_rank(config, rank or Rank(0, 1, 0), allow_fresh_start)
        leave(0)
    return 0


def problems(config: RunConfig, ranks: int, allow_data_change: bool, allow_fresh_start: bool) -> list[str]:
    """All that is wrong with a run on so many ranks, a line each."""
    found = check(config, ranks)
    try:
        sources = open_sources(config.data, Path(config.run_dir))
    except DataError as error:
        return found + str(error).splitlines()
    # Whether the run folder holds this run means nothing until model and data fit each other.
    return [
        *found,
        *(
            check_data(config, sources)
            or check_run_dir(config, run_record(config, sources), allow_data_change, allow_fresh_start)
        ),
    ]


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Two runs in one folder would write over each other."""
    with ExitStack() as held:
        try:
            held.enter_context(locked_folder(run_dir, wait=False))
        except NoLocksError as error:
            print(f"triplane: {error}: see that no second run is started in this folder", file=sys.stderr)
        yield


def _check_writing(config: RunConfig) -> None:
    if problem := write_problem(checkpoints_folder(config)):
        raise ConfigError(f"{problem}; set another checkpoint.folder or run_dir")


def _check_port(port: int) -> None:
    """Raises ConfigError if rank 0 could not serve its metrics there."""
    from triplane.training.prometheus import Endpoint  # few runs need it

    try:
        Endpoint(port).close()
    except OSError as error:
        raise ConfigError(f"training.prometheus_port ({port}): {error.strerror}; set another") from None


def _local_ranks(config: RunConfig) -> int:
    """Ranks to start on this machine: what the layout needs, dp filling up the GPUs if it is `auto`."""
    one, dp = config.parallel.ranks_of_one, config.parallel.dp
    if dp != "auto":
        return one * dp
    from torch import cuda  # 2 s to import

    return one * max(1, cuda.device_count() // one)
