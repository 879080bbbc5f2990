"""The live table, on a terminal of its own."""

import contextlib
import os
import pty
import re
import sys
import time
from pathlib import Path

from runs import held_by_another

from triplane.launcher.monitor.run_status import read_status
from triplane.launcher.monitor.watch import _table, watch
from triplane.storage.files import write_whole
from triplane.training.metrics import MetricsWriter
from triplane.training.run_log import record_event


def shown_by(master: int, text: str, seconds: float = 60) -> str:
    """Returns the terminal's output up to the point where it contains `text`."""
    shown, deadline_s = b"", time.monotonic() + seconds
    while text.encode() not in shown:
        assert time.monotonic() < deadline_s, shown
        shown += os.read(master, 1 << 16)
    return shown.decode(errors="replace")  # a read may end within a character


def test_many_runs_are_rows_of_what_has_room(tmp_path: Path) -> None:
    for i in range(6):
        run = tmp_path / f"lr_{i}"
        record_event(run, "start", 0, layout="dp 2", ranks=2, precision="fp32")
        (run / "config.toml").write_text("training = { steps = 100 }\n")
    with contextlib.chdir(tmp_path):
        table = _table([read_status(Path(run.name)) for run in sorted(tmp_path.iterdir())], [], width=60)
    assert table.row_count == 6
    headers = [column.header for column in table.columns]
    assert headers == ["run", "state", "step", "time left", "loss", "tokens/s", "MFU"]


def test_the_table_follows_a_run_until_it_is_done(tmp_path: Path) -> None:
    ramp = "[{ after_steps = 50, global_batch_size = 16 }]"
    (tmp_path / "config.toml").write_text(f"training = {{ steps = 100, global_batch_size = 8, batch_ramp = {ramp} }}\n")
    record_event(tmp_path, "start", 0, layout="dp 2", ranks=2, precision="fp32")
    record_event(tmp_path, "save", 20, checkpoint="step_20")
    writer = MetricsWriter(tmp_path, 0)
    writer.metrics(25, {"loss": 3.25, "tokens_per_s": 12_345, "mfu": 0.4123, "step_time_s": 2.0})
    with held_by_another(tmp_path):
        child, master = pty.fork()
        if not child:
            os.environ.update(COLUMNS="200", LINES="40", TERM="xterm")
            os.execv(sys.executable, [sys.executable, "-m", "triplane", "status", str(tmp_path), "--watch"])
        first = shown_by(master, "last update")
        record_event(tmp_path, "resume", 20, layout="dp 4", ranks=4, precision="fp32")
        writer.metrics(100, {"loss": 3.0})
        writer.close()
        write_whole(tmp_path / "DONE", b"100\n")
        last = shown_by(master, "100/100")
    for name, value in (
        ("state", "running"),
        ("step", "25/100"),
        ("loss", "3.2500"),
        ("tokens/s", "12.3 k"),
        ("MFU", "41.2%"),
        ("time left", "4 m 10 s"),
        ("checkpoint", r"20, \d+ s ago"),
        ("restarts", "0"),
        ("ranks", "2"),
    ):
        assert re.search(rf"│ {name} +│ {value} +│", first), f"{name} {value}: {first}"
    assert re.search(r"│ state +│ completed +│", last)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_table_ends_when_the_runs_have_died(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("training = { steps = 100 }\n")
    record_event(tmp_path, "start", 0, layout="dp 2", ranks=2, precision="fp32")
    watch(tmp_path)
