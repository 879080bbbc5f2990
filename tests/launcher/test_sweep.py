"""Sweeps of real small runs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import triplane
from runs import small_run
from small_corpora import Prepared

from triplane.config.toml import to_toml
from triplane.launcher.monitor.run_status import find_runs
from triplane.launcher.variants import variants
from triplane.storage.errors import ConfigError
from triplane.training.run_log import EVENTS, read_log


@pytest.fixture
def folder(prepared: Prepared, tmp_path: Path) -> Path:
    write_config(prepared, tmp_path)
    return tmp_path


def write_config(prepared: Prepared, folder: Path, **training: object) -> None:
    (folder / "small.toml").write_text(to_toml(small_run(prepared, Path("run"), training={"steps": 4, **training})))


def events(run_dir: Path) -> list[str]:
    return [event["event"] for event in read_log(run_dir / "history.jsonl", EVENTS)]


def rows(output: str) -> list[list[str]]:
    """Returns the rows of the table at the end."""
    return [line.split() for line in output.split("\n\n")[-1].splitlines()[1:]]


def test_variants_are_trained_once_and_compared(prepared: Prepared, folder: Path) -> None:
    arguments = ("sweep", "small.toml", "optimizer.lr=1e-4,1e-2", "parallel.zero=0,1")
    one = "run/sweep/lr=1e-4,zero=1"
    begun = triplane(
        "train", "small.toml", "optimizer.lr=1e-4", f"run_dir={one}", "training.stop_at_step=2", cwd=folder
    )
    assert begun.returncode == 0, begun.stderr
    (folder / one / "config.toml").write_text(
        (folder / one / "config.toml").read_text().replace("stop_at_step = 2", "")
    )
    first = triplane(*arguments, cwd=folder)
    assert first.returncode == 0, first.stderr
    names = {"lr=1e-4,zero=0", "lr=1e-4,zero=1", "lr=1e-2,zero=0", "lr=1e-2,zero=1"}
    table = rows(first.stdout)
    assert {row[0] for row in table} == names and {row[-1] for row in table} == {"completed"}
    assert [row[0][:7] for row in table] == ["lr=1e-2"] * 2 + ["lr=1e-4"] * 2  # by validation loss
    assert [float(row[2]) for row in table] == sorted(float(row[2]) for row in table)
    assert all(0 < float(row[3]) < float(row[2]) for row in table)  # bits a byte, nats a token
    assert events(folder / one).count("resume") == 1
    assert {run.name for run in find_runs(folder)} == names
    histories = {name: events(folder / "run/sweep" / name) for name in names}
    again = triplane(*arguments, cwd=folder)
    assert again.returncode == 0 and rows(again.stdout) == table
    assert {name: events(folder / "run/sweep" / name) for name in names} == histories
    write_config(prepared, folder, eval_sequences=8)
    other = triplane(*arguments, cwd=folder)
    assert other.returncode == 2
    assert other.stderr.startswith("triplane: lr=1e-4,zero=0: training.eval_sequences is 8, but run/sweep/")
    assert other.stderr.count("has 16; give another folder by --out\n") == 4


def test_every_mistake_is_told_before_the_first_starts(folder: Path) -> None:
    choices = ("training.global_batch_size=8,7", "optimizer.lr=1e-2,1e-3", "parallel.tp=1,8")
    result = triplane("sweep", "small.toml", *choices, "--out", "out", cwd=folder)
    assert result.returncode == 2 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("triplane: global_batch_size=8,lr=1e-2,tp=8 and 3 more: n_heads (4) is not a multiple")
    assert lines[1].startswith("triplane: global_batch_size=7,lr=1e-2,tp=1 and 3 more: global_batch_size (7) is not a")
    shared = triplane("sweep", "small.toml", "checkpoint.folder=kept", "seed=1,2", "--out", "out", cwd=folder)
    assert "kept) is that of another variant too" in shared.stderr and shared.stderr.count("\n") == 1
    missing = triplane("sweep", "small.toml", "data.sources=[{corpus='no'}]", "seed=1,2", "--out", "out", cwd=folder)
    assert missing.stderr.startswith("triplane: no/train/manifest.json: ") and missing.stderr.count("\n") == 1
    assert not (folder / "out").exists()


def test_a_failure_does_not_stop_the_others(folder: Path) -> None:
    begun = triplane("sweep", "small.toml", "seed=1", cwd=folder)
    assert begun.returncode == 0, begun.stderr
    run_dir = folder / "run/sweep/seed=1"
    (run_dir / "DONE").unlink()
    for file in run_dir.glob("checkpoints/*/rank_0.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")  # found only when it is read
    result = triplane("sweep", "small.toml", "seed=1,2", cwd=folder)
    assert result.returncode == 1
    assert [row[0] for row in rows(result.stdout) if row[-1] == "completed"] == ["seed=2"]
    assert [row[-3:] for row in rows(result.stdout) if row[0] == "seed=1"] == [["exit", "code", "2"]]


def test_a_signal_saves_the_variant_that_trains_and_starts_no_other(prepared: Prepared, folder: Path) -> None:
    write_config(prepared, folder, steps=100_000)
    command = [sys.executable, "-m", "triplane", "sweep", "small.toml", "seed=1,2"]
    metrics = folder / "run/sweep/seed=1/metrics.jsonl"
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        deadline_s = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        busy = triplane("sweep", "small.toml", "seed=1,2", cwd=folder)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert busy.returncode == 75
    assert process.returncode == 0
    assert [(row[0], row[-1]) for row in rows(output)] == [("seed=1", "stopped"), ("seed=2", "started")]
    assert "save" in events(folder / "run/sweep/seed=1")
    assert not (folder / "run/sweep/seed=2/history.jsonl").exists()


def names(*choices: str) -> list[str]:
    return [variant.name for variant in variants(choices)]


def test_names_tell_keys_and_values() -> None:
    assert names("optimizer.lr=1e-3, 2e-3", "seed=1") == ["lr=1e-3,seed=1", "lr=2e-3,seed=1"]
    assert names("model.norm.eps=1", "model.qk_norm.eps=2") == ["model.norm.eps=1,model.qk_norm.eps=2"]
    assert names("training.precision='bf16',fp32", "model.window=none") == [
        "precision=bf16,window=none",
        "precision=fp32,window=none",
    ]
    brackets = names("data.sources=[{corpus='a,b', weight=1}, {corpus='c'}],[{corpus=\"]\"}]")
    assert len(brackets) == 2 and all("/" not in name and "[" not in name for name in brackets)
    odd = names("run.name=a/b,a_b,a b,..", f"x={'1' * 300},2")
    assert len(set(odd)) == 8 and max(map(len, odd)) < 200


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        (["lr=1,true,1.0"], "lr=1,true,1.0: 1.0 is given twice"),
        (["lr=1,,2"], "override 'lr=': give it as key.path=value"),
        (["lr=1", "lr=2"], "lr=2: lr is given twice"),
        (["lr"], "override 'lr=': give it as"),
        (["run_dir=a,b"], "run_dir=a,b: each variant has a run_dir of its own"),
    ],
)
def test_choices_that_cannot_be(choices: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        variants(choices)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)
