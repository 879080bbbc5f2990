"""The progress line: plain in a log, live and one line wide on a terminal."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from triplane.training.progress import Progress
from triplane.training.units import format_count, format_duration

VALUES = {"loss": 2.10341, "tokens_per_s": 1_234_567.0, "mfu": 0.4123, "gradient_norm": 1.0}


def run(console: Console) -> str:
    times = iter([100.0, 104.0])
    progress = Progress(480_000, console, lambda: next(times))
    progress.update(239_998, {"loss": 3.0})
    progress.message("saved [bold] step 239999 in runs/a-rather-long-name/checkpoints/step_239999: 12.3 GiB, 4.5 s")
    progress.update(240_000, VALUES)
    progress.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_plain_lines() -> None:
    assert run(Console(file=io.StringIO(), width=80)).splitlines() == [
        "step 239998/480000  loss 3.0000",
        "saved [bold] step 239999 in runs/a-rather-long-name/checkpoints/step_239999: 12.3 GiB, 4.5 s",
        "step 240000/480000  loss 2.1034  1.23 M tokens/s  MFU 41.2 %  5 d 13 h left",
    ]


def test_the_time_left_follows_the_work_that_is_left() -> None:
    """Ten steps, of which those after the fifth are four times as long."""
    times, console = iter([0.0, 2.0]), Console(file=io.StringIO(), width=80)
    progress = Progress(10, console, lambda: next(times), work=lambda step: step + 3 * max(0, step - 5))
    progress.update(1, {})
    progress.update(3, {})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("step 3/10  22 s left\n")


def test_a_terminal_shows_one_line_of_80_columns() -> None:
    screen = run(Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, legacy_windows=False))
    shown = screen.rsplit("\x1b[2K", 1)[1].split("\n")[0]
    line = "step 240000/480000  loss 2.1034  1.23 M tokens/s  MFU 41.2 %  5 d 13 h left "
    assert shown.startswith(line) and len(shown) == 80
    assert "saved [bold] step 239999" in screen


def test_training_goes_on_when_the_log_is_on_a_full_disk() -> None:
    code = (
        "import sys; from triplane.training.progress import Progress; progress = Progress(9)\n"
        "from triplane.training.exits import leave\n"
        "for step in range(1, 4): progress.update(step, {'loss': 3.0})\n"
        "progress.close(); print('step', step, file=sys.stderr); leave(0)"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (result.returncode, result.stderr) == (0, b"step 3\n")


def test_training_goes_on_when_nobody_reads() -> None:
    code = (
        "import sys; from triplane.training.progress import Progress; progress = Progress(9)\n"
        "sys.stdin.read(1)\n"
        "for step in range(1, 4): progress.update(step, {'loss': 3.0})\n"
        "progress.close(); print('step', step, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b"step 3\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 m 0 s"), (80, "1 m 20 s"), (3600, "1 h 0 m"), (86_399, "23 h 59 m"), (97_200, "1 d 3 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7.25, "7.25"),
        (999.4, "999"),
        (999.6, "1.00 k"),
        (12_345, "12.3 k"),
        (4_194_304, "4.19 M"),
        (1e13, "10.0 T"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text
