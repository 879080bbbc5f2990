"""The gate finds each problem before a rank starts, and reports it once."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import triplane
from runs import held_by_another, small_run
from small_corpora import Prepared

from triplane.config.toml import to_toml
from triplane.launcher.run import train_on
from triplane.plan.amount import Amount
from triplane.plan.gate import examine, memory_problem
from triplane.prove.forked import run_ranks
from triplane.training.config import RunConfig


def started(config: RunConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    """`triplane train`, in a process of its own."""
    (folder / "run.toml").write_text(to_toml(config))
    return triplane("train", "run.toml", cwd=folder)


def trained(config: RunConfig, ranks: int = 1) -> None:
    run_ranks(config.parallel, ranks, train_on, config)


def test_a_folder_of_checkpoints_belongs_to_one_run(prepared: Prepared, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"checkpoint": {"folder": str(tmp_path / "shared")}}
    first = small_run(prepared, tmp_path / "a", **shared)
    trained(first)
    assert examine(first, 1).problems == []
    (problem,) = examine(small_run(prepared, tmp_path / "b", **shared), 1).problems
    assert problem.startswith(f"{tmp_path}/shared/step_8 belongs to the run {tmp_path}/a, not to {tmp_path}/b: set")
    # A run folder that was lost or renamed has the same checkpoints.
    (tmp_path / "a").rename(tmp_path / "moved")
    assert examine(first, 1).problems == []
    assert examine(small_run(prepared, tmp_path / "moved", **shared), 1).problems == []


def test_a_folder_of_checkpoints_is_held(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path / "run", checkpoint={"folder": str(tmp_path / "shared")})
    with held_by_another(tmp_path / "shared"):
        refused = started(config, tmp_path)
    assert refused.returncode == 75
    assert refused.stderr.splitlines() == [
        f"triplane: {tmp_path}/shared: in use by another process: wait for it to end"
    ]


def test_a_step_has_one_length(prepared: Prepared, tmp_path: Path) -> None:
    phases = {"seq_len": 32, "shuffle_window": 64, "phases": [{"from_sequence": 64, "weights": [1.0], "seq_len": 64}]}
    begun = small_run(prepared, tmp_path / "run", data=phases, training={"stop_at_step": 5})
    trained(begun)
    larger = {"global_batch_size": 16, "micro_batch_size": 4, "steps": 40}
    (problem,) = examine(small_run(prepared, tmp_path / "run", data=phases, training=larger), 1).problems
    assert problem == (
        f"data.phases[0]: seq_len changes at from_sequence (64), within a step: after "
        f"{tmp_path}/run/checkpoints/step_5 the next begins at 72"
    )
    fits = {"global_batch_size": 4, "micro_batch_size": 2, "steps": 40}
    assert examine(small_run(prepared, tmp_path / "run", data=phases, training=fits), 1).problems == []
    ramp = larger | {"global_batch_size": 8, "batch_ramp": [{"after_steps": 8, "global_batch_size": 16}]}
    assert examine(small_run(prepared, tmp_path / "run", data=phases, training=ramp), 1).problems == []


def test_the_amount_of_text_is_told(prepared: Prepared, tmp_path: Path) -> None:
    held = prepared.train.tokens
    steps = 1 + 5 * held // (8 * 32)
    found = examine(small_run(prepared, tmp_path / "run", training={"steps": steps, "eval_sequences": 10_000}), 1)
    assert isinstance(found.amount, Amount)
    assert found.amount.read == steps * 8 * 32 and found.amount.held == held
    again, few = found.warnings
    assert again.startswith(f"{prepared.folder}: read 5.0 times; over 4 epochs")
    assert few.startswith("training.eval_sequences (10000) is more than the ")
    assert not found.problems
    assert f"({5:.3g} epochs)" in next(found.notes())


def test_phases_count_with_their_length_and_weights(prepared: Prepared, tmp_path: Path) -> None:
    folder = str(prepared.folder)
    sources = [{"corpus": folder}, {"corpus": f"{folder}/"}]
    data = {"sources": sources, "phases": [{"from_sequence": 32, "weights": [1.0, 3.0], "seq_len": 64}]}
    amount = examine(small_run(prepared, tmp_path / "run", data=data, training={"steps": 8}), 1).amount
    assert amount is not None
    first, second = (prepared.train.tokens * amount.epochs[source["corpus"]] for source in sources)
    assert first == pytest.approx(16 * 32 + 8 * 64) and second == pytest.approx(16 * 32 + 24 * 64)


def test_imported_weights_may_have_more_embeddings_than_there_are_tokens(prepared: Prepared, tmp_path: Path) -> None:
    tokens = prepared.tokenizer.vocab_size
    for vocab_size, initial, fits in ((tokens + 8, None, False), (tokens + 8, "x", True), (tokens - 8, "x", False)):
        checkpoint = {"initial": initial} if initial else {}
        config = small_run(prepared, tmp_path / "run", model={"vocab_size": vocab_size}, checkpoint=checkpoint)
        refused = any(problem.startswith("model.vocab_size is") for problem in examine(config, 1).problems)
        assert refused != fits, (vocab_size, initial)


def test_memory_that_cannot_suffice_stops_a_start(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path / "run", parallel={"dp": 2})
    assert memory_problem(config, 2) is None
    huge = small_run(prepared, tmp_path / "run", model={"dim": 2**16, "hidden_dim": 2**18}, parallel={"dp": 2})
    problem = memory_problem(huge, 2)
    assert problem is not None and "of 2 ranks need" in problem and "GiB of memory, but this machine has" in problem
    refused = started(huge, tmp_path)
    assert refused.returncode == 2 and problem.partition(", but")[0] in refused.stderr
    assert not list(tmp_path.glob("run/*"))


def test_ranks_do_not_ask_again(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path / "run", parallel={"dp": 2, "zero": 0}, training={"steps": 2})
    ended = started(config, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("epochs)") == 1


@pytest.mark.parametrize("name", ["config.toml", "DONE", "metrics.jsonl", "history.jsonl", "logs", "checkpoints"])
def test_what_stands_in_the_place_of_a_file_or_folder_is_named(name: str, prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path / "run")
    place = tmp_path / "run" / name
    kind = "file" if "." in name or name == "DONE" else "folder"
    if kind == "file":
        place.mkdir(parents=True)
    else:
        place.parent.mkdir()
        place.touch()
    (problem,) = examine(config, 1).problems
    assert problem.startswith(f"{place}: a run has a {kind} there, and this is none; ")
