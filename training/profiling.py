"""Traces some steps, for Perfetto or chrome://tracing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, record_function

from triplane.training.config import ProfileConfig
from triplane.training.run_folder import RunFolder


class Profiler:
    """Writes `run_dir/profile/rank_N.json` after the last step of the window, or on exit within it."""

    def __init__(self, config: ProfileConfig, run_dir: Path, rank: int):
        start = config.start_step if rank in config.ranks else None
        self._window = range(0) if start is None else range(start, start + config.steps)
        self._path = RunFolder(run_dir).trace(rank)
        self._profile: profile | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._write(self._profile)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Records the step in the block if it is in the window."""
        if step not in self._window:
            yield
            return
        if self._profile is None:
            self._profile = profile()
            self._profile.start()
        with record_function(f"step {step}"):
            yield
        if step == self._window[-1]:
            self._write(self._profile)

    def _write(self, recorded: profile) -> None:
        self._profile = None
        recorded.stop()
        try:
            self._path.parent.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:  # a missing trace must not end training
            print(f"no {self._path}: {error}", flush=True)
