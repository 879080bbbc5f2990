"""The report of a run, as a browser shows it."""

import json
import os
import re
import shutil
import subprocess
import time
from html import escape, unescape
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from triplane.launcher.monitor.axis import linear, logarithmic
from triplane.launcher.monitor.board import board
from triplane.launcher.monitor.report import write_report
from triplane.storage.errors import CheckpointError, LaunchError
from triplane.training.metrics import MetricsWriter
from triplane.training.run_log import record_event

CONFIG = """
model = { vocab_size = 4096, dim = 128, n_layers = 4, n_heads = 2 }
training = { steps = 5000, global_batch_size = 16 }
data = { sources = [{ corpus = "a<b", weight = 3.0 }, { corpus = "web", weight = 1.0 }], seq_len = 256 }
optimizer = { lr = 0.005 }
"""
FACTS = {"layout": "dp 2", "ranks": 2, "precision": "fp32", "device": "Abacus 9", "host": "desk", "commit": "c0ffee"}
MEASURED = {"versions": "torch 2", "parameters": 1_900_000, "corpus_tokens": 4_000_000, "unigram_loss": 6.5}
PHONE, DESKTOP = (400, 5000), (1280, 2000)
DARK = "--blink-settings=preferredColorScheme=0"


def log(run_dir: Path, steps: range, *, lr: float = 0.005) -> None:
    """Logs what a run of 5,000 steps may log in the given ones, with a spike."""
    writer = MetricsWriter(run_dir, 0)
    for step in steps:
        spike = 90.0 if step == 777 else 0.0
        loss = float("nan") if step == 5 else 2 + 6 / step**0.5 + step % 7 / 20 + spike
        learning = {"loss": loss, "gradient_norm": 1 / step, "learning_rate": lr, "tokens_seen": step * 4096}
        speed = {"tokens_per_s": 8192.0 + step % 5, "step_time_s": 0.5, "mfu": 0.4, "memory_gib": 0.402}
        writer.metrics(step, learning | speed | {"user/rare <words>": 1 / step})
        if step in (steps[len(steps) // 2], steps[-1]):
            writer.metrics(step, {"validation_loss": 2.5 + 1 / step, "validation_bits_per_byte": 1.5 + 0.6 / step})
            writer.metrics(step, {"checkpoint_time_s": 0.004 + step / 1e6, "checkpoint_stall_time_s": 0.001})
    writer.sample(steps[-1], "if a < b:\n    pass </pre>")
    writer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 2,000 steps with a resume and a rollback, one of 40 steps, and one of a single step."""
    runs = tmp_path_factory.mktemp("runs")
    for name, steps, config in (
        ("faulty", range(1, 2001), CONFIG),
        ("plain", range(1, 41), CONFIG.replace("0.005", "0.001")),
        ("begun", range(1, 2), CONFIG),
    ):
        (runs / name).mkdir()
        (runs / name / "config.toml").write_text(config)
        record_event(runs / name, "start", 0, **FACTS, **MEASURED)
        log(runs / name, steps)
    record_event(runs / "plain", "resume", 20, **FACTS | MEASURED | {"unigram_loss": 6.25})
    record_event(runs / "plain", "stopped", 40, steps_left=4960)
    record_event(runs / "faulty", "save", 900, checkpoint="step_900")
    record_event(runs / "faulty", "failure", 950, rank=1, host="desk", where="step", error="killed")
    record_event(runs / "faulty", "resume", 900, **FACTS | MEASURED | {"layout": "tp 2"})
    record_event(runs / "faulty", "rollback", 1000, from_step=1010, reason="loss <nan>")
    return runs


@pytest.fixture(scope="module")
def run_dir(runs: Path) -> Path:
    return runs / "faulty"


@pytest.fixture(scope="module")
def report(run_dir: Path) -> Path:
    write_report([run_dir], run_dir / "report.html")
    return run_dir / "report.html"


@pytest.fixture(scope="module")
def pages(runs: Path, report: Path) -> dict[str, Path]:
    """Reports by what they are of."""
    pages = {name: runs / name / "report.html" for name in ("faulty", "plain", "begun")}
    for page in pages.values():
        write_report([page.parent], page)
    write_report([runs / name for name in pages], runs / "comparison.html")
    return pages | {"comparison": runs / "comparison.html"}


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
    assert "tp 2 on 2 ranks, fp32; died" in html
    assert "loss &lt;nan&gt;" in html
    assert "a&lt;b</td><td>75.0%" in html
    assert "pass &lt;/pre&gt;</pre>" in html
    assert "Checkpoints saved: 1, the last at step 900" in html
    assert not re.search(r"https?:|<script|<link|src=", html)


def test_it_says_what_the_run_is(pages: dict[str, Path]) -> None:
    html = unescape(pages["plain"].read_text())
    for name, fact in {
        "model": "1.90 M parameters; 4 layers, 2 heads, 128 wide, 4,096 tokens in the vocabulary",
        "batch": "4,096 tokens a step: 16 sequences of 256",
        "corpus": "a<b, web; 4.00 M tokens",
        "baselines": "ln 4,096 = 8.318; unigram, first 4 M tokens = 6.250",
        "machine": "Abacus 9, desk",
        "versions": "torch 2",
        "commit": "c0ffee",
    }.items():
        assert f"<th>{name}</th><td>{fact}</td>" in html
    assert "<b>0.041</b><span>epochs" in html
    assert "<b>12.5</b><span>perplexity" in html  # exp(2.525)
    assert "; stopped; written" in html
    assert "unigram, first 4 M tokens = 6.25" in html and "ln 4,096 = 8.32" in html


def test_time_lost_is_from_the_state_saved_to_the_return(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    events = [
        (-50, "start", 0),
        (0, "start", 0),  # died before it saved: 50 s
        (100, "save", 50),
        (130, "failure", 60),
        (200, "resume", 50),  # 100 s
        (210, "rollback", 50),  # 10 s
        (300, "save", 100),
        (310, "stopped", 100),
        (8900, "checkpoint set aside", 100),
        (8950, "data appended", 100),
        (9000, "resume", 100),
        (9100, "resume", 100),  # died without a word: 100 s
    ]
    now = time.time()
    lines = [{"time": now + after, "event": event, "step": step, "details": {}} for after, event, step in events]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([tmp_path], tmp_path / "report.html")
    assert "<b>4 m 20 s</b><span>lost to faults" in (tmp_path / "report.html").read_text()


def test_runs_are_compared(runs: Path, pages: dict[str, Path]) -> None:
    html = pages["comparison"].read_text()
    assert "<h1>3 runs</h1>" in html
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", html)]
    assert ["optimizer.lr", "0.005", "0.001", "0.005"] in rows
    assert ["step", "2,000 of 5,000", "40 of 5,000", "1 of 5,000"] in rows
    assert not any(row[0] in ("model.dim", "run_dir", "host") for row in rows)
    assert html.count("<h3>rare &lt;words&gt; ") == 1
    loss = html.split("<h3>")[1]
    assert all(f'<polyline class="line{number}"' in loss for number in range(3))
    with pytest.raises(LaunchError, match="plain: given twice"):
        write_report([runs / "plain", runs / "plain"], runs / "twice.html")


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (7.59, 7.61),
        (0, 0.406),
        (3e-5, 6e-5),
        (0, 5e-3),
        (0, 12_000),
        (9_999, 10_001),
        (-3, 2),
        (4, 4),
        (0, 3e11),
    ],
)
def test_labels_tell_ticks_apart(low: float, high: float) -> None:
    axis = linear(low, high)
    labels = [label for _, label in axis.ticks]
    assert 2 <= len(labels) <= 7 and len(set(labels)) == len(labels)
    assert axis.low <= low <= high <= axis.high
    endings = {re.sub(r"[-\d.,]", "", label) for label in labels if label != "0"}
    decimals = {len(label.partition(".")[2]) for label in labels if label != "0"}
    assert len(endings) == 1 and len(decimals) == 1


@pytest.mark.parametrize(("low", "high"), [(2.1, 8.3), (1, 2000), (1, 1), (1e-4, 90), (2.51, 2.54)])
def test_ticks_of_logarithmic_axes_are_apart(low: float, high: float) -> None:
    axis = logarithmic(low, high, apart=0.1)
    labels = [label for _, label in axis.ticks]
    assert len(labels) > 1 and len(set(labels)) == len(labels)
    places = [axis.at(value) for value, _ in axis.ticks]
    assert all(0 <= place <= 1 for place in places)
    assert min(b - a for a, b in pairwise(places)) >= 0.1


def test_long_curves_are_thinned_and_keep_their_spikes(report: Path) -> None:
    dots = re.search(r'class="dots faint line0" d="([^"]+)"', report.read_text())
    assert dots is not None
    points = [tuple(map(float, point.split())) for point in re.findall("M([^h]+)h0", dots.group(1))]
    assert 150 < len(points) <= 300
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    spike = min(points, key=lambda point: point[1])
    others = [y for _, y in points if y > spike[1]]
    assert min(others) > spike[1] + 100


def test_a_run_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    write_report([tmp_path], tmp_path / "report.html")
    assert "Nothing is logged yet" in (tmp_path / "report.html").read_text()


def test_a_folder_whose_name_is_not_utf8_has_a_report_but_no_board(tmp_path: Path) -> None:
    run_dir = tmp_path / os.fsdecode(b"run\xff")
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(CONFIG)
    write_report([run_dir], run_dir / "report.html")
    assert "run\\udcff" in (run_dir / "report.html").read_text()
    with pytest.raises(CheckpointError, match=r"run\\xff: not UTF-8; rename it"):
        board(tmp_path, "localhost", 0)


def test_a_browser_draws_it_light_and_dark(report: Path) -> None:
    light = screenshot(report, DESKTOP)
    assert light[0xF7, 0xF7, 0xF5] > 300_000
    assert light[0x25, 0x63, 0xC9] > 300  # the curves
    dark = screenshot(report, PHONE, DARK)
    assert dark[0x13, 0x14, 0x16] > 300_000
    assert dark[0x6E, 0xA2, 0xFF] > 300


MEASURE = """
const page = document.querySelector("iframe").contentDocument, found = {overlaps: [], repeats: [], outside: []};
const shown = (within, what) => [...within.querySelectorAll(what)].filter(one => one.getClientRects().length);
page.getElementById(AXES)?.click();
for (const svg of shown(page, ".cards .card > div > svg")) {
  const texts = shown(svg, "text"), box = svg.getBoundingClientRect();
  texts.forEach((text, i) => {
    const a = text.getBoundingClientRect();
    if (a.left < box.left || a.right > box.right || a.bottom > box.bottom) found.outside.push(text.textContent);
    for (const other of texts.slice(0, i)) {
      const b = other.getBoundingClientRect();
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
        found.overlaps.push([text.textContent, other.textContent]);
      if (text.getAttribute("class") === other.getAttribute("class") && text.textContent === other.textContent)
        found.repeats.push(text.textContent);
    }
  });
}
const rows = {};
for (const tile of shown(page, ".tiles .card")) {
  const top = Math.round(tile.getBoundingClientRect().top);
  rows[top] = (rows[top] ?? 0) + 1;
}
found.rows = Object.values(rows);
found.swatches = shown(page, ".beside svg, .runs svg").map(one => one.getBoundingClientRect().width);
found.wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;
found.logarithmic = shown(page, ".log svg").length;
found.charts = shown(page, ".cards svg polyline").filter(line => line.closest(".key") === null).length;
document.title = JSON.stringify(found);
"""


@pytest.mark.parametrize("axes", ["linear", "log"])
@pytest.mark.parametrize("options", [(), (DARK,)], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1280])
def test_nothing_overlaps_repeats_or_stands_alone(
    width: int, options: tuple[str, ...], axes: str, pages: dict[str, Path]
) -> None:
    for name, page in pages.items():
        measured = page.with_name("measured.html")
        frame = f'<iframe width="{width}" height="3000" srcdoc="{escape(page.read_text())}"></iframe>'
        script = f"onload = () => {{ {MEASURE.replace('AXES', json.dumps(axes))} }}"
        measured.write_text(f"<!doctype html><title></title>{frame}<script>{script}</script>")
        title = re.search("<title>(.*?)</title>", browse(measured, (1400, 900), "--dump-dom", *options))
        assert title is not None
        found = json.loads(unescape(title.group(1)))
        assert found["overlaps"] == found["repeats"] == found["outside"] == [], name
        assert all(count > 1 for count in found["rows"]), name
        assert found["wide"] <= 0, name
        assert set(found["swatches"]) <= {16}, name
        assert found["charts"] > 5 and found["logarithmic"] == (0 if axes == "linear" else 3 if "comp" in name else 2)
