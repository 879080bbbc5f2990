"""`triplane sweep`: trains variants of a run one after another, each in its own folder, and compares them."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from triplane.config.load import load_config
from triplane.config.preflight import checkpoints_folder, flatten
from triplane.config.toml import format_value
from triplane.launcher.monitor.jobs import state_of
from triplane.launcher.monitor.run_status import read_status
from triplane.launcher.monitor.table import print_table
from triplane.launcher.train import alone_in, folder_problems, local_ranks, machine_problems
from triplane.launcher.variants import variants
from triplane.parallel.devices import use_cpu
from triplane.parallel.ranks import current_rank
from triplane.plan.gate import examine
from triplane.storage.errors import ConfigError, LaunchError
from triplane.training.config import RunConfig
from triplane.training.exits import Exit
from triplane.training.stopping import STOP_SIGNALS
from triplane.training.units import format_count

_COLUMNS = ("variant", "loss", "validation loss", "bits/byte", "tokens/s", "state")


def sweep(path: Path, choices: Sequence[str], out: Path | None, *, on_cpu: bool = False) -> int:
    """Trains every combination of the choices that is not done yet, and prints a table; returns the exit code."""
    if current_rank(os.environ) is not None:
        raise LaunchError("sweep starts the ranks of each run by itself: start it without torchrun or srun")
    if path.suffix != ".toml":
        raise ConfigError(f"{path}: give a config, a file that ends in .toml")
    if on_cpu:
        use_cpu()
    overrides = {variant.name: variant.overrides for variant in variants(choices)}
    configs = _load(path, overrides, out)
    _refuse({name: list(_differences(config)) for name, config in configs.items()})
    left = {name: config for name, config in configs.items() if config.folder.steps_done() < config.training.steps}
    _refuse({name: _problems(config) for name, config in left.items()})
    _refuse(_shared_checkpoints(configs))
    folder = next(iter(configs.values())).folder.path.parent
    with alone_in(folder):
        _refuse({name: folder_problems(config, local=True) for name, config in left.items()})
        print(f"{folder}: variants: {len(configs)}, done: {len(configs) - len(left)}", flush=True)
        children, codes = _Children(), dict[str, int]()
        for name, config in left.items():
            if not children.stopped_by:
                print(f"\n{len(codes) + 1} of {len(left)}: {name}", flush=True)
                run_dir = f"run_dir={format_value(config.run_dir)}"
                codes[name] = children.run(["train", str(path), *overrides[name], run_dir])
    rows = sorted(_row(name, config, codes.get(name, 0)) for name, config in configs.items())
    print()
    print_table([_COLUMNS, *(shown for _, _, shown in rows)])
    if children.stopped_by and next(reversed(codes.values()), 0):
        return 128 + children.stopped_by
    return Exit.FAILED if any(codes.values()) else Exit.OK


def _load(path: Path, overrides: Mapping[str, list[str]], out: Path | None) -> dict[str, RunConfig]:
    """Reads the config of each variant, with its own run folder."""
    configs: dict[str, RunConfig] = {}
    problems: dict[str, list[str]] = {}
    for name, changes in overrides.items():
        try:
            folder = load_config(path, changes).folder.sweep if out is None else out
            configs[name] = load_config(path, [*changes, f"run_dir={format_value(str(folder / name))}"])
            problems[name] = []
        except ConfigError as error:
            problems[name] = str(error).splitlines()
    _refuse(problems)
    return configs


def _refuse(problems: Mapping[str, list[str]]) -> None:
    """Raises ConfigError with all problems; names the variant, except where all have the same."""
    names: dict[str, list[str]] = {}
    for name, found in problems.items():
        for line in found:
            names.setdefault(line, []).append(name)
    if names:
        raise ConfigError("\n".join(_who(where, len(problems)) + line for line, where in names.items()))


def _who(names: list[str], variants: int) -> str:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return "" if len(names) == variants else f"{names[0]}{others}: "


def _differences(config: RunConfig) -> Iterator[str]:
    """Yields the keys in which a variant that was started before differs from this config."""
    if not config.folder.config.exists():
        return
    ours, theirs = (flatten(each.model_dump()) for each in (config, load_config(config.folder.config)))
    for key in sorted((ours.keys() | theirs.keys()) - {"run_dir"}):
        if ours.get(key) not in ("auto", theirs.get(key)):  # the start replaced auto
            yield f"{key} is {ours.get(key)}, but {config.run_dir} has {theirs.get(key)}; give another folder by --out"


def _problems(config: RunConfig) -> list[str]:
    ranks = local_ranks(config)
    return [*examine(config, ranks).problems, *machine_problems(config, None, ranks)]


def _shared_checkpoints(configs: Mapping[str, RunConfig]) -> dict[str, list[str]]:
    folders = [checkpoints_folder(config) for config in configs.values()]
    return {
        name: [f"checkpoint.folder ({folder}) is that of another variant too; unset it by checkpoint.folder=none"]
        for name, folder in zip(configs, folders)
        if folders.count(folder) > 1
    }


def _row(name: str, config: RunConfig, code: int) -> tuple[float, float, tuple[str, ...]]:
    """Returns what rows are sorted by, and the row."""
    state = f"exit code {code}" if code else "not started"
    metrics: dict[str, float] = {}
    if config.folder.config.exists():
        run = read_status(config.folder.path)
        metrics, state = run.metrics, f"{state_of(run)}, exit code {code}" if code else state_of(run)
    keys = ("loss", "validation_loss", "validation_bits_per_byte")
    found = [metrics.get(key, math.inf) for key in keys]
    loss, _, bits_per_byte = (value if math.isfinite(value) else math.inf for value in found)
    figures = ("-" if math.isinf(value) else f"{value:.4f}" for value in found)
    speed = format_count(metrics["tokens_per_s"]) if "tokens_per_s" in metrics else "-"
    return bits_per_byte, loss, (name, *figures, speed, state)


class _Children:
    """The process that trains, one after another. Signals are passed on to it, so that it saves and exits."""

    def __init__(self) -> None:
        self.stopped_by = 0
        self._process: subprocess.Popen[bytes] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)

    def run(self, arguments: Sequence[str]) -> int:
        """Runs `triplane` to its end; returns the exit code."""
        # In a session of its own, so that it receives Ctrl-C once.
        self._process = subprocess.Popen([sys.executable, "-m", "triplane", *arguments], start_new_session=True)
        if self.stopped_by:  # during the start
            self._process.send_signal(self.stopped_by)
        return self._process.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        if self._process is not None:
            self._process.send_signal(number)
