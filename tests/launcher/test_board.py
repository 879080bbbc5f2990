"""TensorBoard as `triplane board` starts it, asked as its pages ask it."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from triplane.launcher.monitor.board import _Links
from triplane.training.metrics import MetricsWriter
from triplane.training.run_log import record_event


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a TensorBoard on a folder with two runs, one resumed with another learning rate; one has variants."""
    runs = tmp_path_factory.mktemp("runs")
    for run, resume_step, lr in (("one", 0, 0.5), ("one", 2, 0.25), ("two", 0, 0.125), ("one/sweep/two", 0, 0.125)):
        toml = f"[optimizer]\nlr = {lr}\n[parallel]\ncp_method = 'ring'\n"
        record_event(runs / run, "start", resume_step, layout="dp 2", ranks=2, precision="fp32")
        (runs / run / "config.toml").write_text(toml)
        writer = MetricsWriter(runs / run, resume_step)
        writer.choices(resume_step, toml, {"optimizer.lr": lr, "parallel.cp_method": "ring"})
        writer.metrics(resume_step + 2, {"loss": 3.0, "validation_loss": 4.0, "tokens_per_s": 9.0})
        writer.close()
    command = [sys.executable, "-m", "triplane", "board", str(runs), "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # the tests may run in the background
    ) as process:
        assert process.stdout is not None
        try:
            yield next(found.group() for line in process.stdout if (found := re.search(r"http://\S+:\d+/", line)))
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


def ask(address: str, path: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{address}data/plugin/{path}", data, headers), timeout=60) as answer:
        return answer.read().decode()


def test_runs_have_the_names_of_their_folders_and_charts_have_both_lines(address: str) -> None:
    tags = json.loads(ask(address, "timeseries/tags"))["scalars"]["runTagInfo"]
    runs = ("one", "one-sweep-two", "two")
    assert tags == {
        **{run: ["1 loss/loss", "3 speed/tokens_per_s"] for run in runs},
        **{f"{run}/validation": ["1 loss/loss"] for run in runs},
    }
    for run, loss in (("one", 3.0), ("one/validation", 4.0)):
        points = json.loads(ask(address, f"scalars/scalars?run={run}&tag=1%20loss%2Floss"))
        assert [(step, value) for _, step, value in points] == [(2, loss), (4, loss)]


def test_no_two_runs_share_a_name(tmp_path: Path) -> None:
    runs = [tmp_path / "runs" / run for run in ("a-b", "a/b", "c/b", "d/e-f/g", "d-e/f/g", "d/e/f/g")]
    for run in runs:
        record_event(run, "start", 0, layout="dp 1", ranks=1, precision="fp32")
        MetricsWriter(run, 0).close()
    links = _Links(tmp_path / "runs", tmp_path / "shown")
    links.refresh()
    names = {str(run.relative_to(tmp_path / "runs")): name for run, name in links.names.items()}
    assert [names[run] for run in ("a-b", "a/b", "c/b")] == ["a-b", "a-b-2", "c-b"]
    assert sorted(names[run] for run in names if "g" in run) == ["d-e-f-g", "d-e-f-g-2", "d-e-f-g-3"]
    assert {path.name for path in (tmp_path / "shown").iterdir()} == set(names.values())


def test_the_config_is_text(address: str) -> None:
    texts = json.loads(ask(address, "text/text?run=one&tag=config/text_summary"))
    assert [text["step"] for text in texts] == [0, 2]
    assert "lr = 0.25" in texts[1]["text"]


def test_hyperparameters_are_those_that_differ(address: str) -> None:
    experiment = json.loads(ask(address, "hparams/experiment", {}))
    assert [info["name"] for info in experiment["hparamInfos"]] == ["optimizer.lr"]
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    request = {"allowedStatuses": statuses, "startIndex": 0, "sliceSize": 10, "colParams": []}
    groups = json.loads(ask(address, "hparams/session_groups", request))["sessionGroups"]
    found = {group["name"].rpartition("runs0/")[2]: group["hparams"]["optimizer.lr"] for group in groups}
    assert found == {"one": 0.5, "two": 0.125, "one/sweep/two": 0.125}  # the first of each run
    (one,) = (group for group in groups if group["name"].endswith("/one"))
    assert {metric["name"]["group"]: metric["value"] for metric in one["metricValues"]} == {"": 3.0, "validation": 4.0}
