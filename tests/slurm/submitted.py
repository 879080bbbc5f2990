"""A run as the person who submitted it sees it."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runs import small_run
from slurm.cluster import Cluster, until
from small_corpora import Prepared

from triplane.config.toml import to_toml
from triplane.slurm.client import limit_s


def with_config(folder: Path, prepared: Prepared) -> Path:
    """`folder` with a config `long.toml` of a run that does not end by itself, saved every 20 steps."""
    config = small_run(
        prepared,
        Path("run"),
        parallel={"tp": 2, "dp": "auto"},
        schedule={"kind": "constant"},
        training={"steps": 1_000_000, "eval_every_steps": 1_000_000},
        checkpoint={"every_steps": 20},
    )
    (folder / "long.toml").write_text(to_toml(config))
    return folder


@dataclass
class Submitted:
    """The run in `folder/run` and its job."""

    cluster: Cluster
    folder: Path
    job: str = ""
    _asked_s: float = 0.0
    _begun: int = 0
    """Segments that had begun when it last was seen to train."""

    def triplane(self, *arguments: object) -> subprocess.CompletedProcess:
        return self.cluster.run(sys.executable, "-m", "triplane", *arguments, cwd=self.folder)

    def queue(self, *arguments: object) -> None:
        """`submit` or `resume`."""
        result = self.triplane(*arguments)
        assert result.returncode == 0, result.stderr
        match = re.match(r"job (\d+):", result.stdout)
        assert match, result.stdout
        self.job = match[1]

    @property
    def state(self) -> str:
        return self.cluster.field(self.job, "JobState")

    @property
    def nodes(self) -> list[str]:
        listed = self.cluster.output("scontrol", "show", "hostnames", self.cluster.field(self.job, "NodeList"))
        return listed.split()

    @property
    def step(self) -> int:
        """The last one that was logged."""
        lines = self.metrics()
        return lines[-1]["step"] if lines else 0

    def metrics(self) -> list[dict]:
        path = self.folder / "run/metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def events(self, *names: str) -> list[dict]:
        path = self.folder / "run/history.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if not names or event["event"] in names]

    @property
    def said(self) -> str:
        """By the batch script."""
        path = self.folder / "run/logs/job.log"
        return path.read_text() if path.exists() else ""

    def trains(self) -> None:
        """Waits until this segment has taken some steps."""
        until(lambda: self.state == "RUNNING", "the job runs")
        until(lambda: len(self.events("start", "resume")) > self._begun, "the run begins")
        self._begun = len(self.events("start", "resume"))
        least = self.step + 5
        until(lambda: self.step > least, f"step {least}")

    def nears_its_limit(self) -> None:
        """Shortens the limit, so that Slurm itself warns the job when it next looks, as it does each half minute."""
        warnings = self.said.count("warned")
        run_s = limit_s(self.cluster.field(self.job, "RunTime"))
        self._set(f"TimeLimit={math.ceil((run_s + 31) / 60)}")
        until(lambda: self.said.count("warned") > warnings, "the warning")
        until(lambda: self.state == "PENDING", "the job is requeued")
        self._set("TimeLimit=30")

    def goes_on(self) -> None:
        """Waits until it is back in the queue, and spares it the two minutes that Slurm lets it wait.

        Not all of them: what was revoked for a job is still so within the same second.
        """
        until(lambda: self.state == "PENDING", "the job is requeued")
        self._asked_s = 0.0
        until(self._runs_soon, "the job runs again")

    def _runs_soon(self) -> bool:
        if self.state == "PENDING" and time.monotonic() > self._asked_s + 6:
            self.cluster.run("scontrol", "update", f"JobId={self.job}", "StartTime=now+2")
            self._asked_s = time.monotonic()
        return self.state == "RUNNING"

    def _set(self, what: str) -> None:
        self.cluster.output("scontrol", "update", f"JobId={self.job}", what)

    def warn(self) -> None:
        """As Slurm does before the time limit."""
        warnings = self.said.count("warned")
        # Not `output`: for a task of an array it sends the signal and then says that it failed.
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.job)
        until(lambda: self.said.count("warned") > warnings, "the warning")

    def stays(self, state: str) -> None:
        until(lambda: self.state not in ("PENDING", "RUNNING", "COMPLETING"), "the job ends")
        for _ in range(3):
            assert self.state == state
            self.cluster.output("sleep", "1")


def ranks_on(cluster: Cluster, node: str) -> list[str]:
    """The pids of the ranks on a node, as the node sees them."""
    return cluster.run_on(node, "pgrep", "--full", "^[^ ]*python[^ ]* -m triplane train").split()
