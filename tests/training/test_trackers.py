"""Trackers and callbacks of the user's own follow a real run; W&B and trackio are read back from what they wrote."""

import json
import os
import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import small_run
from small_corpora import Prepared
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from triplane.launcher.run import train_on
from triplane.parallel import megatron, zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.plan.gate import examine
from triplane.prove.forked import run_ranks
from triplane.storage.errors import ConfigError
from triplane.training.callback import Callback
from triplane.training.callbacks import load_callbacks, measured, tracking_problems
from triplane.training.config import RunConfig

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/guides.md").read_text().partition("## Trackers and metrics of your own")[2]
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", SECTION.partition("\n## ")[0], re.DOTALL)
NOTES = '''
from triplane.training.callback import Callback

class Notes(Callback):
    """Writes down what it is told; of samples it says that it cannot."""

    def start(self, run):
        self.file = (run.config.folder.path / "notes").open("a")
        self.note("start", run.step, run.id, run.choices["optimizer.lr"])

    def note(self, *what):
        print(*what, file=self.file, flush=True)

    def metrics(self, step, values):
        self.note("metrics", step, *sorted(values.keys() & {"loss", "validation_loss", "user/tokens"}))

    def sample(self, step, text):
        raise KeyError(f"no samples at {step}")

    def event(self, step, event, details):
        self.note("event", step, event)

    def rewind(self, step):
        self.note("rewind", step)

    def close(self):
        self.note("close")

class Broken(Callback):
    def start(self, run):
        raise ValueError("not today")

    def metrics(self, step, values):
        raise AssertionError("it never started")

class Odd:
    pass
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with modules of a user's; the import system forgets them afterwards."""
    (tmp_path / "notes.py").write_text(NOTES)
    (tmp_path / "late_loss.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("notes", "late_loss"):
        sys.modules.pop(name, None)


def train(config: RunConfig) -> None:
    layout = config.parallel
    assert layout.dp != "auto"
    run_ranks(layout, layout.ranks_of_one * layout.dp, _train, config)


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def tracked(config: RunConfig, *names: str) -> RunConfig:
    return config.model_copy(update={"tracking": list(names)})


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def offline_records(path: Path) -> Iterator[Record]:
    """Reads W&B's file: a header of 7 bytes, then blocks of 32 KiB with records in LevelDB's log format."""
    content = path.read_bytes()
    at, whole = 7, b""
    while at < len(content):
        if (left := -at % 32_768) and left < 7:
            at += left
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def history(path: Path) -> list[dict[str, float]]:
    return [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for record in offline_records(path)
        if record.HasField("history")
    ]


def test_the_moments_of_a_run_reach_a_callback(
    prepared: Prepared, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = here / "run"
    changes = {"checkpoint": {"every_steps": 4, "asynchronous": False}}
    training = {"log_every_steps": 2, "sample_every_steps": 8}
    for stop in (4, 8):
        config = small_run(prepared, run_dir, training=training | {"stop_at_step": stop}, **changes)
        train(tracked(config, "notes:Notes", "notes:Broken"))
    own = (run_dir / "run_id").read_text().strip()
    assert (run_dir / "notes").read_text().splitlines() == [
        f"start 0 {own} 0.01",
        "event 0 start",
        "metrics 1 loss",
        "metrics 2 loss",
        "metrics 4 loss",
        "metrics 4 validation_loss",
        "metrics 4",
        "event 4 save",
        "event 4 stopped",
        "close",
        f"start 4 {own} 0.01",
        "event 4 resume",
        "metrics 6 loss",
        "metrics 8 loss",
        "metrics 8 validation_loss",
        "metrics 8",
        "event 8 save",
        "event 8 completed",
        "close",
    ]
    shown = capfd.readouterr().out
    assert "step 8: NOT RECORDED BY Notes: 'no samples at 8'\n" in shown
    assert shown.count("NOT FOLLOWED BY Broken: not today\n") == 2
    assert json.loads((run_dir / "samples.jsonl").read_text())["step"] == 8  # our own records do not suffer


def test_a_rollback_is_told(prepared: Prepared, here: Path) -> None:
    sys.path.append(str(here))
    from notes import Notes  # type: ignore[import-not-found]

    from triplane.training.callback import Run
    from triplane.training.report import Report

    config = small_run(prepared, here / "run")
    config.folder.path.mkdir()
    report = Report(Run(config=config, toml="", choices={"optimizer.lr": 1}, id="a", step=0), 0, [Notes()])
    report.metrics(3, {"loss": 1.0})
    report.rewind(2)
    report.metrics(3, {"loss": 2.0})
    report.close(3)
    told = [line.split()[:2] for line in (here / "run/notes").read_text().splitlines()]
    assert told == [["start", "0"], ["metrics", "3"], ["rewind", "2"], ["metrics", "3"], ["close"]]
    assert [record["loss"] for record in records(here / "run")] == [2.0]


def _orders(mesh: Mesh) -> dict[str, float]:
    class Two(Callback):
        def measure(self, batches: object, evaluate: object) -> dict[str, tuple[float, float]]:
            sums = {"a": (1.0 + mesh.rank, 1.0), "b": (10.0, 5.0)}
            return sums if mesh.rank else dict(reversed(sums.items()))

    engine = SimpleNamespace(mesh=mesh, evaluate=None)
    with pytest.raises(ConfigError, match="Two: another callback measures a too; rename it"):
        measured([Two(), Two()], [], engine)  # type: ignore[arg-type]
    return measured([Two()], [], engine)  # type: ignore[arg-type]


def test_metrics_are_added_by_name_whatever_their_order_on_a_rank() -> None:
    assert run_ranks(ParallelConfig(dp=2), 2, _orders) == [{"user/a": 1.5, "user/b": 2.0}] * 2


@pytest.mark.slow
def test_a_metric_of_the_user_is_the_same_under_every_layout(prepared: Prepared, here: Path) -> None:
    found = []
    for layout in ({"dp": 1}, {"dp": 2}, {"dp": 1, "tp": 2}, {"dp": 1, "pp": 2}, {"dp": 1, "cp": 2}):
        run_dir = here / "-".join(f"{axis}{size}" for axis, size in layout.items())
        config = small_run(prepared, run_dir, parallel=layout, training={"steps": 3, "eval_every_steps": 3})
        train(tracked(config, "late_loss:LateLoss"))
        found.append([record for record in records(run_dir) if "loss" in record])
    for alone, *others in zip(*found):
        assert alone["user/late_loss"] != pytest.approx(alone["loss"], abs=1e-3)
        assert 0 < alone["user/late_fraction"] < 1
        for other in others:
            assert other["user/late_fraction"] == alone["user/late_fraction"]
            assert other["user/late_loss"] == pytest.approx(alone["user/late_loss"], abs=1e-5)


@pytest.mark.slow
def test_wandb_and_trackio_follow_a_run_and_resume_it(
    prepared: Prepared, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(here / "trackio"))
    run_dir = here / "run"
    for stop in (4, 8):
        training = {"log_every_steps": 2, "sample_every_steps": 8, "stop_at_step": stop}
        config = tracked(small_run(prepared, run_dir, training=training), "wandb", "trackio")
        assert not examine(config, 1).problems
        train(config)
    losses = {record["step"]: record["loss"] for record in records(run_dir) if "loss" in record}
    assert losses.keys() == {1, 2, 4, 6, 8}
    own = (run_dir / "run_id").read_text().strip()

    shown = re.findall(r"^wandb: (/.*)$", capfd.readouterr().out, re.MULTILINE)
    assert [Path(folder).parent for folder in shown] == [run_dir / "wandb"] * 2
    first, second = sorted((run_dir / "wandb").glob(f"offline-run-*/run-{own}.wandb"))
    for path, steps in ((first, {1, 2, 4}), (second, {6, 8})):
        (started,) = (record.run for record in offline_records(path) if record.HasField("run"))
        assert (started.run_id, started.project, started.display_name) == (own, "triplane", str(run_dir))
        told: dict[str, str] = {item.key: item.value_json for item in started.config.update}
        assert json.loads(told["optimizer.lr"]) == 1e-2
        lines = history(path)
        assert {line["step"]: line["loss"] for line in lines if "loss" in line} == {
            step: losses[step] for step in steps
        }
    assert any("sample" in str(line) for line in lines)

    with sqlite3.connect(here / "trackio/triplane.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    assert len({run_id for run_id, *_ in rows}) == 1 and {name for _, name, *_ in rows} == {f"run-{own[:8]}"}
    values: list[tuple[int, Mapping[str, float]]] = [(step, json.loads(content)) for *_, step, content in rows]
    assert {step: line["loss"] for step, line in values if "loss" in line} == losses
    assert [step for step, line in values if "sample" in line] == [8]


def test_what_cannot_be_called_is_one_line_before_a_rank_starts(
    prepared: Prepared, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tracked(
        small_run(prepared, here / "run"), "wandbb", "notes:Note", "notes:Odd", "absent:Metric", "wandb", "a-b:C"
    )
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert examine(config, 1).problems == [
        "tracking: a-b:C is unknown; give wandb, trackio, or module:Class",
        f"tracking: absent:Metric cannot be loaded: ModuleNotFoundError: No module named 'absent'; put its file into "
        f"{here}, or install it",
        "tracking: notes:Note cannot be loaded: AttributeError: module 'notes' has no attribute 'Note'",
        "tracking: notes:Odd: notes:Odd is not a subclass of triplane.training.callback.Callback",
        "tracking: wandb: no API key; give one by `wandb login`, or set WANDB_MODE=offline",
        "tracking: wandbb is unknown; give wandb, trackio, or module:Class",
    ]
    assert "WANDB_SERVICE" not in os.environ
    assert list(tracking_problems(["notes:Notes"] * 2)) == ["tracking: notes:Notes is given 2 times; give it once"]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triplane.training.trackers.find_spec", lambda name: None)
    assert list(tracking_problems([package])) == [
        f"tracking: {package}: the package {package} is not installed; "
        f"install it by `pip install 'triplane[{package}]'`"
    ]


def test_a_package_offers_a_callback_by_an_entry_point(here: Path) -> None:
    info = here / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[triplane.callbacks]\nnotes = notes:Notes\n")
    with pytest.raises(ConfigError, match="notes is unknown; give wandb, trackio, or module:Class"):
        load_callbacks(["notes"])
    sys.path.append(str(here))
    (callback,) = load_callbacks(["notes"])
    assert type(callback).__name__ == "Notes"
