"""A run of `triplane train`, started again and again in one folder, and what can be seen of it from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from triplane.checkpoint.folder import latest, step_of
from triplane.config.toml import to_toml
from triplane.parallel.config import ParallelConfig
from triplane.training.config import RunConfig

_PATIENCE_S = 90.0
_HOOKS = Path(__file__).parent / "hooks"


class BrokenError(AssertionError):
    """A promise that was not kept."""


class Victim:
    """The folder of one run, and the processes that work in it now."""

    def __init__(self, config: RunConfig, folder: Path, skipped: list[list[int]] | None = None) -> None:
        """`skipped`: what a reference begins with."""
        self.folder = folder
        self.run = Path(config.run_dir)
        self.corpus = Path(config.data.sources[0].corpus)
        self.struck_s = 0.0
        """When the last fault struck."""
        self.temporary = Path(mkdtemp(prefix="chaos-"))
        """Temporary folder of its processes; the path is short, since it holds sockets."""
        for name in ("armed", "batches", "output"):
            (folder / name).mkdir(parents=True)
        self._config = folder / "config.toml"
        self._config.write_text(to_toml(config))
        self._skipped = skipped or []
        self._seq_len = config.data.seq_len
        self._starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, layout: ParallelConfig, *overrides: str) -> None:
        """As a user would; returns at once."""
        assert self.process is None
        self.process = self._command(layout, *overrides)

    def refused(self, layout: ParallelConfig, code: int = 2) -> str:
        """Starts the run, which must be refused with this exit code; returns the message."""
        process = self._command(layout)
        if process.wait(_PATIENCE_S) != code:
            raise self.broken(f"exit code {process.returncode} of a start that was to be refused")
        return self._errors.read_text()

    def _command(self, layout: ParallelConfig, *overrides: str) -> "subprocess.Popen[bytes]":
        self._starts += 1
        axes = [f"parallel.{key}={json.dumps(value)}" for key, value in layout.model_dump(mode="json").items()]
        paths = [_HOOKS, Path(__file__).parents[1], *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        alone = {"CHAOS_ALONE": "1"} if layout.dp == layout.ranks_of_one == 1 else {}
        with self._errors.with_suffix(".out").open("wb") as output, self._errors.open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "triplane", "train", self._config, *axes, *overrides],
                env=os.environ
                | alone
                | {
                    "PYTHONPATH": os.pathsep.join(map(str, paths)),
                    "OMP_NUM_THREADS": "1",
                    "TORCH_COMPILE_DISABLE": "1",
                    "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled"),
                    "TMPDIR": str(self.temporary),
                    "CHAOS_FOLDER": str(self.folder),
                    "CHAOS_SEQ_LEN": str(self._seq_len),
                    "CHAOS_SKIPPED": json.dumps(self._skipped),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def _errors(self) -> Path:
        """The stderr of the last start."""
        return self.folder / "output" / f"{self._starts}.err"

    def arm(self, name: str) -> None:
        """Makes one rank err at the place of this name in `hooks/sitecustomize.py`."""
        (self.folder / "armed" / name).touch()

    def is_armed(self, name: str) -> bool:
        return (self.folder / "armed" / name).exists()

    def strike(self, *pids: int, by: int = signal.SIGKILL) -> None:
        """Sends a signal to processes of the run."""
        self.struck()
        for pid in pids:
            with suppress(ProcessLookupError):  # one may end between the look and the kill
                os.kill(pid, by)

    def struck(self) -> None:
        self.struck_s = time.time()

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Waits while the run goes on."""
        end_s = time.monotonic() + _PATIENCE_S
        while not condition():
            if self.process is not None and self.process.poll() is not None and not condition():
                raise self.broken(f"ended with code {self.process.returncode} before {what}")
            if time.monotonic() > end_s:
                raise self.broken(f"waited {_PATIENCE_S:.0f} s for {what}")
            time.sleep(0.01)

    def until_gone(self) -> None:
        """Waits for the processes that outlive the one that was started."""
        self.until(lambda: not self.processes(), "the end of all processes")

    def ended(self) -> int:
        """Waits for the end of the run and of each process; returns the exit code."""
        assert self.process is not None
        self.until(lambda: self.process is None or self.process.poll() is not None, "its end")
        code = self.process.returncode
        self.process = None
        self.until_gone()
        return code

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def broken(self, what: str) -> BrokenError:
        logs = [*sorted((self.run / "logs").glob("*.log")), self._errors]
        tails = [f"--- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.exists()]
        return BrokenError("\n".join([what, *tails]))

    def kill(self) -> None:
        """Ends every process of the run, whatever state it is in."""
        self.strike(*self.processes())
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def processes(self) -> dict[int, dict[str, str]]:
        """The environments of the run's processes, by pid."""
        return dict(_processes(f"CHAOS_FOLDER={self.folder}"))

    def ranks(self) -> list[int]:
        """The pids of its ranks; none if one process is launcher and rank."""
        members = self._members()
        return [pid for pid in members if _parent(pid) not in members]

    def workers(self) -> list[int]:
        """The pids of the ranks' data workers."""
        members = self._members()
        return [pid for pid in members if _parent(pid) in members]

    def _members(self) -> set[int]:
        """Ranks, and what they have forked, which has their environment."""
        return {pid for pid, variables in self.processes().items() if "RANK" in variables}

    def history(self, event: str | None = None, since_s: float = 0.0) -> list[dict[str, Any]]:
        """The events, of one kind if `event` is given."""
        events = _lines(self.run / "history.jsonl")
        return [line for line in events if line["time"] >= since_s and event in (None, line["event"])]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines that have it."""
        return [line for line in _lines(self.run / "metrics.jsonl") if name in line]

    def batches(self) -> list[dict[str, Any]]:
        """Returns the batches that the ranks read, ordered by time."""
        records = [record for path in (self.folder / "batches").iterdir() for record in _lines(path)]
        return sorted(records, key=lambda record: record["time"])

    def progressed_since(self, time_s: float) -> bool:
        """Whether a step was logged after that."""
        logged = self.metrics("loss")
        return bool(logged) and logged[-1]["time"] > time_s

    @property
    def step(self) -> int:
        """The last that was logged."""
        logged = self.metrics("loss")
        return logged[-1]["step"] if logged else 0

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def saved_step(self) -> int:
        """Step of the newest checkpoint."""
        newest = latest(self.checkpoints)
        return step_of(newest) if newest else 0


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _processes(mark: str) -> Iterator[tuple[int, dict[str, str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended meanwhile, or is another's
                continue
            if mark in variables:
                yield int(folder.name), dict(line.split("=", 1) for line in variables if "=" in line)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
