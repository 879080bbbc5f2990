"""The report of a run, as a browser shows it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from triplane.launcher.monitor.board import board
from triplane.launcher.monitor.report import write_report
from triplane.storage.errors import CheckpointError
from triplane.training.metrics import MetricsWriter
from triplane.training.run_log import record_event

CONFIG = """
training = { steps = 5000 }
data = { sources = [{ corpus = "a<b", weight = 3.0 }, { corpus = "web", weight = 1.0 }] }
"""
PHONE, DESKTOP = (400, 3400), (1280, 2000)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 2,000 steps with a spike, a resume and a rollback."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "config.toml").write_text(CONFIG)
    record_event(run_dir, "start", 0, layout="dp 2", ranks=2, precision="fp32")
    writer = MetricsWriter(run_dir, 0)
    for step in range(1, 2001):
        spike = 90.0 if step == 777 else 0.0
        loss = float("nan") if step == 5 else 2 + 9 / step + spike
        writer.metrics(step, {"loss": loss, "mfu": 0.4, "step_time_s": 0.5, "memory_gib": 3.0})
    writer.metrics(2000, {"validation_loss": 2.5})
    writer.sample(2000, "if a < b:\n    pass </pre>")
    writer.close()
    record_event(run_dir, "save", 900, checkpoint="step_900")
    record_event(run_dir, "resume", 900, layout="tp 2", ranks=2, precision="fp32")
    record_event(run_dir, "rollback", 1000, from_step=1010, reason="loss <nan>")
    return run_dir


@pytest.fixture(scope="module")
def report(run_dir: Path) -> Path:
    write_report(run_dir, run_dir / "report.html")
    return run_dir / "report.html"


def browse(page: Path, size: tuple[int, int], *options: object) -> str:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--window-size={},{}".format(*size), f"--user-data-dir={page.parent / 'browser'}"]
    command += [*map(str, options), page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def screenshot(page: Path, size: tuple[int, int], *options: object) -> dict[tuple[int, int, int], int]:
    """How many pixels have each colour."""
    picture = page.parent / "{}x{}.png".format(*size)
    browse(page, size, f"--screenshot={picture}", *options)
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    return {colour: count for count, colour in colours if isinstance(colour, tuple) and len(colour) == 3}


def test_it_says_what_happened_and_escapes_it(report: Path) -> None:
    html = report.read_text()
    assert "<b>2,000</b><span>of 5,000 steps" in html
    assert "<b>16 m 40 s</b><span>trained" in html
    assert "tp 2 on 2 ranks, fp32; not done" in html
    assert "loss &lt;nan&gt;" in html
    assert "a&lt;b</td><td>75.0%" in html
    assert "pass &lt;/pre&gt;</pre>" in html
    assert "Checkpoints saved: 1, the last at step 900" in html
    assert not re.search(r"https?:|<script|<link|src=", html)


def test_long_curves_are_thinned_and_keep_their_spikes(report: Path) -> None:
    loss = re.search(r'class="line0" points="([^"]+)"', report.read_text())
    assert loss is not None
    points = [tuple(map(float, point.split(","))) for point in loss.group(1).split()]
    assert 300 < len(points) <= 600
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    spike = min(points, key=lambda point: point[1])
    others = [y for _, y in points if y > spike[1]]
    assert min(others) > spike[1] + 100


def test_a_run_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    write_report(tmp_path, tmp_path / "report.html")
    assert "Nothing is logged yet" in (tmp_path / "report.html").read_text()


def test_a_folder_whose_name_is_not_utf8_has_a_report_but_no_board(tmp_path: Path) -> None:
    run_dir = tmp_path / os.fsdecode(b"run\xff")
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(CONFIG)
    write_report(run_dir, run_dir / "report.html")
    assert "run\\udcff" in (run_dir / "report.html").read_text()
    with pytest.raises(CheckpointError, match=r"run\\xff: not UTF-8; rename it"):
        board(tmp_path, "localhost", 0)


def test_a_browser_draws_it_light_and_dark(report: Path) -> None:
    light = screenshot(report, DESKTOP)
    assert max(light, key=lambda colour: light[colour]) == (0xF7, 0xF7, 0xF5)
    assert light[0x25, 0x63, 0xC9] > 300  # the curves
    dark = screenshot(report, PHONE, "--blink-settings=preferredColorScheme=0")
    assert max(dark, key=lambda colour: dark[colour]) == (0x13, 0x14, 0x16)
    assert dark[0x6E, 0xA2, 0xFF] > 300


def test_it_fits_a_phone(report: Path) -> None:
    measured = report.with_name("measured.html")
    measured.write_text(
        report.read_text()
        + "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}, ` +"
        + "[...document.querySelectorAll('polyline')].filter(line => line.getBoundingClientRect().width > 200).length"
        + "</script>"
    )
    title = re.search("<title>(.*?)</title>", browse(measured, PHONE, "--dump-dom"))
    assert title is not None
    width, available, curves = map(int, re.findall(r"\d+", title.group(1)))
    assert width <= available <= 500
    assert curves == 4
