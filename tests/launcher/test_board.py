"""TensorBoard as `triplane board` starts it, asked as its pages ask it."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from urllib.request import Request, urlopen

import pytest

from triplane.training.metrics import MetricsWriter
from triplane.training.run_log import record_event


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a TensorBoard on a folder with one run, resumed with another learning rate."""
    runs = tmp_path_factory.mktemp("runs")
    for resume_step, lr in ((0, 0.5), (2, 0.25)):
        record_event(runs / "one", "start", resume_step, layout="dp 2", ranks=2, precision="fp32")
        writer = MetricsWriter(runs / "one", resume_step)
        writer.choices(resume_step, f"[optimizer]\nlr = {lr}\n", {"optimizer.lr": lr, "parallel.cp_method": "ring"})
        writer.metrics(resume_step + 2, {"loss": 3.0, "validation_loss": 4.0})
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


def test_curves_are_grouped(address: str) -> None:
    layout = json.loads(ask(address, "custom_scalars/layout"))
    groups = {group["title"]: [chart["title"] for chart in group["chart"]] for group in layout["category"]}
    assert list(groups) == ["learning", "speed", "machine"]
    assert groups["learning"] == [
        "loss, validation_loss",
        "bits_per_byte, validation_bits_per_byte",
        "gradient_norm",
        "learning_rate",
    ]
    curves = json.loads(ask(address, "custom_scalars/scalars?run=one/tensorboard&tag=%5Eloss%24"))
    assert curves["regex_valid"]
    assert {tag: [value for _, _, value in points] for tag, points in curves["tag_to_events"].items()} == {
        "loss": [3.0, 3.0]
    }


def test_the_config_is_text(address: str) -> None:
    texts = json.loads(ask(address, "text/text?run=one/tensorboard&tag=config/text_summary"))
    assert [text["step"] for text in texts] == [0, 2]
    assert "lr = 0.25" in texts[1]["text"]


def test_the_first_choices_are_hyperparameters(address: str) -> None:
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    request = {"allowedStatuses": statuses, "startIndex": 0, "sliceSize": 10, "colParams": []}
    answer = json.loads(ask(address, "hparams/session_groups", request))
    (group,) = answer["sessionGroups"]
    assert group["hparams"] == {"optimizer.lr": 0.5, "parallel.cp_method": "ring"}
