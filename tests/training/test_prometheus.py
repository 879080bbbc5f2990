"""The metrics of a real run, scraped over HTTP and read by the library's own parser."""

import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from runs import small_run
from small_corpora import Prepared
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork

from triplane.launcher.run import train_on
from triplane.launcher.train import _port_problems
from triplane.parallel import zero  # noqa: F401  imported before the ranks fork
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.training.config import RunConfig
from triplane.training.prometheus import Endpoint
from triplane.training.report import Report


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def _train_and_scrape(mesh: Mesh, config: RunConfig) -> str:
    """Returns the endpoint's answer after step 7."""
    metrics, answers = Report.metrics, []

    def and_scrape(report: Report, step: int, values: Mapping[str, float]) -> None:
        metrics(report, step, values)
        if step == 7:
            with urlopen(_url(config), timeout=10) as answer:
                answers.append(answer.read().decode())

    Report.metrics = and_scrape  # type: ignore[assignment]
    train_on(mesh, config)
    with pytest.raises(URLError, match="refused"):
        urlopen(_url(config), timeout=10)
    return answers[0]


def _url(config: RunConfig) -> str:
    return f"http://127.0.0.1:{config.training.prometheus_port}/metrics"


def test_a_scrape_has_the_newest_metrics_in_base_units(prepared: Prepared, tmp_path: Path, port: int) -> None:
    config = small_run(prepared, tmp_path, training={"prometheus_port": port}, checkpoint={"asynchronous": False})
    (scraped,) = run_ranks(config.parallel, 1, _train_and_scrape, config)
    families = {family.name: family for family in text_string_to_metric_families(scraped)}
    found = {name: family.samples[0].value for name, family in families.items() if family.type == "gauge"}
    newest: dict[str, float] = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        newest |= {name: value for name, value in json.loads(line).items() if json.loads(line)["step"] <= 7}
    for theirs, ours, factor in (
        ("step", "step", 1),
        ("loss", "loss", 1),
        ("validation_loss", "validation_loss", 1),
        ("tokens_seen", "tokens_seen", 1),
        ("tokens_per_second_per_rank", "tokens_per_s_per_rank", 1),
        ("step_time_seconds", "step_time_s", 1),
        ("checkpoint_stall_time_seconds", "checkpoint_stall_time_s", 1),
        ("memory_bytes", "memory_gib", 2**30),
    ):
        assert found[f"triplane_{theirs}"] == pytest.approx(newest[ours] * factor), theirs
    assert len(found) == len(newest.keys() - {"time"})
    assert (
        families["triplane_loss"].documentation
        == "nats/token, mean over tokens of the global batches since the last log"
    )
    events = {sample.labels["event"]: sample.value for sample in families["triplane_events"].samples}
    assert events == {"start": 1, "save": 2}


def test_mfu_is_a_ratio(port: int) -> None:
    endpoint = Endpoint(port)
    endpoint.metrics(5, {"loss": 2.0, "mfu": 0.4, "user/mine": 1.0})
    found = {family.name: family.samples[0].value for family in endpoint.collect() if family.samples}
    endpoint.close()
    assert found == {"triplane_step": 5, "triplane_loss": 2.0, "triplane_mfu_ratio": 0.4}


def test_a_port_that_is_taken_is_refused_at_the_start_and_told_later(
    prepared: Prepared, tmp_path: Path, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_run(prepared, tmp_path, training={"prometheus_port": port, "steps": 2})
    said = rf"training.prometheus_port \({port}\): Address already in use"
    with socket.create_server(("", port)):
        (problem,) = _port_problems(port)
        assert re.fullmatch(f"{said}; set another", problem)
        run_ranks(config.parallel, 1, _train, config)
    assert f"NOT SERVED: training.prometheus_port ({port}): Address already in use\n" in capfd.readouterr().out
    assert not list(_port_problems(port))
