"""The record of a run that was killed and resumed is that of one run."""

import errno
import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from triplane.training.board import tag
from triplane.training.metrics import METRICS, MetricsWriter


def log_and_die(run_dir: Path, resume_step: int, steps: range, loss: float) -> None:
    """Logs in a process that is killed without a chance to close anything."""
    child = os.fork()
    if not child:
        writer = MetricsWriter(run_dir, resume_step)
        for step in steps:
            writer.metrics(step, {"loss": loss, "tokens_seen": step * 100})
            writer.sample(step, f"# {loss}\n<b>")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def read_lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_events(run_dir: Path, name: str, of: str = "") -> list[tuple[int, object]]:
    """Steps and values as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir / "tensorboard" / of), size_guidance={"tensors": 0}).Reload()
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(name)]


def test_a_killed_and_resumed_run_leaves_one_curve(tmp_path: Path) -> None:
    log_and_die(tmp_path, 0, range(1, 6), loss=1.0)
    log_and_die(tmp_path, 3, range(4, 8), loss=2.0)
    log_and_die(tmp_path, 6, range(7, 9), loss=3.0)
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 3.0), (8, 3.0)]

    lines = read_lines(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == expected
    assert [line["tokens_seen"] for line in lines] == [100 * step for step in range(1, 9)]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)

    assert read_events(tmp_path, "1 loss/loss") == expected
    texts = [(step, f"    # {loss}\n    <b>\n".encode()) for step, loss in expected]
    assert read_events(tmp_path, "sample/text_summary") == texts
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": step, "sample": f"# {loss}\n<b>"} for step, loss in expected]
    ((_, legend),) = read_events(tmp_path, "metrics/text_summary")
    assert isinstance(legend, bytes) and b"| mfu | fraction of published peak | mean over ranks |" in legend
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl", "tensorboard"]


def test_a_start_from_nothing_keeps_nothing(tmp_path: Path) -> None:
    log_and_die(tmp_path, 0, range(3), loss=1.0)
    log_and_die(tmp_path, 0, range(2), loss=2.0)
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == [(0, 2.0), (1, 2.0)]
    assert read_events(tmp_path, "1 loss/loss") == [(0, 2.0), (1, 2.0)]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    log_and_die(tmp_path, 0, range(1, 3), loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    MetricsWriter(tmp_path, resume_step=2).close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread dies
def test_after_a_full_disk_the_curves_go_on(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "tensorboard").symlink_to(small_disk)
    writer = MetricsWriter(tmp_path, 0)
    writer.metrics(1, {"loss": 1.0})
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            writer.sample(step, "long " * 2000)
    ballast.unlink()
    writer.metrics(4, {"loss": 4.0})
    writer.close()
    # TensorBoard reads files of one second by the process's count of them, as text: 10 stands before 9.
    assert sorted(read_events(tmp_path, "1 loss/loss")) == [(1, 1.0), (4, 4.0)]


def test_a_rollback_on_a_full_disk_leaves_records_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.metrics(1, {"loss": 1.0})
    writer.metrics(2, {"loss": 2.0})
    with monkeypatch.context() as full:

        def no_space(path: Path, first_step: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr("triplane.training.metrics.cut_log", no_space)
        with pytest.raises(OSError, match="No space"):
            writer.rewind(1)
    writer.metrics(2, {"loss": 3.0})
    writer.close()
    assert [line["loss"] for line in read_lines(tmp_path)] == [1.0, 2.0, 3.0]


def test_an_undeclared_metric_is_a_mistake_of_ours(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    with pytest.raises(AssertionError, match="lost"):
        writer.metrics(1, {"lost": 1.0})
    writer.close()
    assert read_lines(tmp_path) == []


def test_validation_is_a_line_of_its_own_in_the_chart_of_training(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.metrics(1, {"loss": 2.0, "user/accuracy": 0.5})
    writer.metrics(1, {"validation_loss": 3.0, "validation_loss/web": 4.0})
    writer.close()
    assert read_events(tmp_path, "1 loss/loss") == [(1, 2.0)]
    assert read_events(tmp_path, "5 user/accuracy") == [(1, 0.5)]
    for name, value in (("1 loss/loss", 3.0), ("1 loss/loss web", 4.0)):
        assert read_events(tmp_path, name, "validation") == [(1, value)]


def test_every_metric_says_what_it_is() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"\d [a-z]+/[a-z_]+", tag(f"{name}/own" if name == "user" else name))
        assert metric.unit and metric.reduction, name
    shown = {name: METRICS[name].format(value) for name, value in {"mfu": 0.4123, "tokens_per_s": 12_345}.items()}
    assert shown == {"mfu": "MFU 41.2 %", "tokens_per_s": "12.3 k tokens/s"}
