"""Interrupted after any step and started again, a run ends with the bytes of the uninterrupted one."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import small_run
from small_corpora import Prepared
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork

from triplane.checkpoint.folder import checkpoints, latest
from triplane.checkpoint.reader import Checkpoint
from triplane.launcher.run import train_on
from triplane.model.count import flops_per_token
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.training.config import RunConfig

LAYOUTS = {"one": {"dp": 1, "zero": 0}, "zero1 dp2": {"dp": 2}, "tp2 pp2": {"dp": 1, "tp": 2, "pp": 2}}
STEPS = 8


def ranks_of(config: RunConfig) -> int:
    assert isinstance(config.parallel.dp, int)
    return config.parallel.dp * config.parallel.tp * config.parallel.pp


def start(config: RunConfig) -> None:
    run_ranks(config.parallel, ranks_of(config), _train, config)


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def final_state(config: RunConfig) -> Checkpoint:
    newest = latest(Path(config.run_dir) / "checkpoints")
    assert newest is not None
    return Checkpoint(newest)


def curve(config: RunConfig, name: str = "loss") -> list[tuple[int, float]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [(entry["step"], entry[name]) for entry in map(json.loads, lines) if name in entry]


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    assert a.shapes == b.shapes
    assert a.state["step"] == b.state["step"] == STEPS
    assert a.state["consumed_sequences"] == b.state["consumed_sequences"]
    for key in a.shapes:
        assert a.tensor(key).equal(b.tensor(key)), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_interrupted_after_each_step_and_resumed_is_bitwise_the_same(
    layout: str, prepared: Prepared, tmp_path: Path
) -> None:
    whole = small_run(prepared, tmp_path / "whole", parallel=LAYOUTS[layout])
    start(whole)
    for stop in range(1, STEPS + 1) if layout != "tp2 pp2" else (2, 5, STEPS):
        cut = small_run(prepared, tmp_path / "cut", parallel=LAYOUTS[layout], training={"stop_at_step": stop})
        start(cut)
    assert_equal(final_state(whole), final_state(cut))
    assert curve(whole) == curve(cut)


def test_a_second_moment_of_rows_and_an_average_resume_bitwise(prepared: Prepared, tmp_path: Path) -> None:
    optimizer = {"kind": "muon", "second_moment_decay": 0.9, "average_decay": 0.9}
    parallel = {"tp": 2, "dp": 2, "zero": 3}
    whole = small_run(prepared, tmp_path / "whole", parallel=parallel, optimizer=optimizer)
    start(whole)
    for stop in (2, STEPS):
        cut = small_run(
            prepared, tmp_path / "cut", parallel=parallel, optimizer=optimizer, training={"stop_at_step": stop}
        )
        start(cut)
    assert_equal(final_state(whole), final_state(cut))
    for name in ("loss", "validation_average_loss"):
        assert curve(whole, name) == curve(cut, name) != []


def test_another_layout_goes_on_to_the_same_model(prepared: Prepared, tmp_path: Path) -> None:
    whole = small_run(prepared, tmp_path / "whole", optimizer={"eps": 1e-3})
    start(whole)
    run = tmp_path / "moving"
    for stop, layout in ((2, {"dp": 2}), (5, {"tp": 2, "pp": 2}), (8, {"dp": 1, "zero": 0})):
        moved = small_run(prepared, run, optimizer={"eps": 1e-3}, parallel=layout, training={"stop_at_step": stop})
        start(moved)
    a, b = final_state(whole), final_state(moved)
    for key in a.shapes:
        torch.testing.assert_close(a.tensor(key), b.tensor(key), atol=1e-5, rtol=0)
    assert [loss for _, loss in curve(whole)] == pytest.approx([loss for _, loss in curve(moved)], abs=1e-5)


def test_a_run_keeps_its_precision_under_another_stage_of_zero(prepared: Prepared, tmp_path: Path) -> None:
    start(small_run(prepared, tmp_path / "run", training={"precision": "bf16", "stop_at_step": 3}))
    resumed = small_run(prepared, tmp_path / "run", parallel={"zero": 0}, training={"precision": "auto"})
    start(resumed)
    assert final_state(resumed).state["run"]["training"]["precision"] == "bf16"


def test_checkpoints_come_when_due_and_old_ones_go(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path / "run")
    start(config)
    folder = Path(config.run_dir) / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step_6", "step_8"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_6", "step_8"]


def test_the_logged_loss_is_the_mean_since_the_last_one(prepared: Prepared, tmp_path: Path) -> None:
    """Also where a checkpoint, a stop, another layout or best-fit packing comes between."""
    data, optimizer = {"packing": "best_fit"}, {"eps": 1e-3}
    each = small_run(prepared, tmp_path / "each", data=data, optimizer=optimizer)
    start(each)
    losses = dict(curve(each))
    tokens = {step: seen - before for (_, before), (step, seen) in pairwise([(0, 0), *curve(each, "tokens_seen")])}
    mean = {
        steps[-1]: sum(losses[step] * tokens[step] for step in steps) / sum(tokens[step] for step in steps)
        for steps in (range(1, 2), range(2, 5), range(5, 9))
    }
    every = {"log_every_steps": 4}
    for layout in ({}, {"dp": 2}, {"dp": 1, "tp": 2, "pp": 2}):
        folder = tmp_path / f"run{len(layout)}"
        for stop in (6, STEPS):  # after a checkpoint at step 3, which a second start reads
            stopped = every | {"stop_at_step": stop}
            run = small_run(prepared, folder, data=data, optimizer=optimizer, parallel=layout, training=stopped)
            start(run)
        shown = dict(curve(run))
        assert list(shown) == [1, 4, 6, 8]
        assert {step: shown[step] for step in mean} == pytest.approx(mean, abs=1e-5)
        assert dict(curve(run, "perplexity"))[8] == pytest.approx(math.exp(shown[8]))


def test_mfu_is_reported_against_a_published_peak(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triplane.launcher.run.peak_flops_per_s", lambda device, dtype: 1e12)
    config = small_run(prepared, tmp_path / "run", parallel={"dp": 2}, training={"steps": 2})
    start(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "loss" in line):
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] / 2 * flops_per_token(config.model, 32) / 1e12)


def test_what_is_reported(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path / "run", parallel={"tp": 2}, training={"sample_every_steps": 4})
    start(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert last["step"] == 8
    assert last["tokens_seen"] == 8 * 8 * 32
    assert "mfu" not in last
    parts = ("data_time_s", "forward_backward_time_s", "optimizer_time_s")
    assert last["step_time_s"] == pytest.approx(sum(last[part] for part in parts))
    assert last["tokens_per_s"] == pytest.approx(8 * 32 / last["step_time_s"])
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert {tensor.step for tensor in events.Tensors("sample/text_summary")} == {4, 8}
    assert "config.toml" in {path.name for path in (tmp_path / "run").iterdir()}


def test_a_ramp_is_the_same_when_it_is_interrupted(prepared: Prepared, tmp_path: Path) -> None:
    """Batches of 4, after step 3 of 8, after step 6 of 4; also on two ranks, and with the warm-up in tokens."""
    ramp = [{"after_steps": 3, "global_batch_size": 8}, {"after_steps": 6, "global_batch_size": 4}]
    changes = {"schedule": {"warmup_steps": None, "warmup_tokens": 20 * 32}}
    training = {"global_batch_size": 4, "batch_ramp": ramp}
    whole = small_run(prepared, tmp_path / "whole", training=training, **changes)
    start(whole)
    rates = dict(curve(whole, "learning_rate"))
    assert rates[3] == pytest.approx(0.75 * rates[4]) and rates[4] == max(rates.values())
    seen = [tokens // 32 for _, tokens in curve(whole, "tokens_seen")]
    assert seen == [4, 8, 12, 20, 28, 36, 40, 44] and final_state(whole).state["consumed_sequences"] == 44
    for name, layouts in {"alike": [{"dp": 1}] * 3, "moving": [{"dp": 2}, {"tp": 2}, {"dp": 2}]}.items():
        for stop, layout in zip((2, 5, STEPS), layouts):
            cut = small_run(
                prepared, tmp_path / name, training=training | {"stop_at_step": stop}, parallel=layout, **changes
            )
            start(cut)
        if name == "alike":
            assert_equal(final_state(whole), final_state(cut))
        assert [loss for _, loss in curve(whole)] == pytest.approx([loss for _, loss in curve(cut)], abs=1e-5)


def test_a_ramp_reads_what_runs_of_its_sizes_read(prepared: Prepared, tmp_path: Path) -> None:
    """As if the run had been stopped to change its batch size by hand; in worker processes too."""
    data = {"num_workers": 1}
    ramp = {"global_batch_size": 2, "batch_ramp": [{"after_steps": 4, "global_batch_size": 8}]}
    at_once = small_run(prepared, tmp_path / "at once", training=ramp, data=data)
    start(at_once)
    for training in ({"global_batch_size": 2, "stop_at_step": 4}, {"global_batch_size": 8}):
        by_hand = small_run(prepared, tmp_path / "by hand", training=training)
        start(by_hand)
    assert_equal(final_state(at_once), final_state(by_hand))
    assert curve(at_once) == curve(by_hand)


def test_a_run_through_phases_is_the_same_when_it_is_interrupted(prepared: Prepared, tmp_path: Path) -> None:
    """At step 5 the weights change and the sequences double; the phase is appended while the run stands still."""
    sources = [{"corpus": str(prepared.folder)}, {"corpus": str(prepared.folder), "weight": 0}]
    data = {"sources": sources, "shuffle_window": 64}
    phases = [{"from_sequence": 32, "weights": [1, 3], "seq_len": 64}]
    whole = small_run(prepared, tmp_path / "whole", data={**data, "phases": phases})
    start(whole)
    for stop, layout, known in ((3, {"dp": 1}, []), (6, {"dp": 1, "tp": 2}, phases), (STEPS, {"dp": 2}, phases)):
        changes = {"data": {**data, "phases": known}, "parallel": layout, "training": {"stop_at_step": stop}}
        cut = small_run(prepared, tmp_path / "cut", **changes)
        start(cut)
    a, b = final_state(whole), final_state(cut)
    assert a.state["tokens_seen"] == b.state["tokens_seen"] == 8 * (4 * 32 + 4 * 64)
    assert [loss for _, loss in curve(whole)] == pytest.approx([loss for _, loss in curve(cut)], abs=1e-5)
    history = [json.loads(line) for line in (tmp_path / "cut/history.jsonl").read_text().splitlines()]
    (appended,) = (event for event in history if event["event"] == "data appended")
    assert "seq_len 64 from sequence 32" in str(appended)
