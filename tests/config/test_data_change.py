"""A run goes on with data whose past is the same, and with other data only if it is told to."""

import json
from pathlib import Path

import pytest
from runs import small_run
from small_corpora import Prepared
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported before the ranks fork
from typer.testing import CliRunner

from triplane.config.data_change import data_change
from triplane.config.preflight import check_run_dir, run_record
from triplane.config.toml import to_toml
from triplane.data.config import DataConfig
from triplane.data.opening import open_sources
from triplane.data.prepare import prepare
from triplane.launcher.cli import app
from triplane.launcher.run import train_on
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.training.config import RunConfig


def _record(sources: list[tuple[str, float, str]], phases: list[dict] | None = None) -> dict:
    data = {"sources": [{"corpus": c, "weight": w} for c, w, _ in sources], "phases": phases or [], "seq_len": 8}
    dumped = DataConfig.model_validate(data).model_dump()
    return {"data": dumped, "corpus_digests": [digest for _, _, digest in sources]}


_A, _B = ("a", 1.0, "da"), ("b", 0.0, "db")


def test_what_is_appended_is_allowed_and_named() -> None:
    change = data_change(_record([_A]), _record([_A, _B], [{"from_sequence": 64, "weights": [1, 1]}]), 64)
    assert (change.refused, change.replaced) == ([], [])
    assert change.appended == [
        "data.sources[1]: b (db)",
        "data.phases[0]: weights [1.0, 1.0], seq_len 8 from sequence 64",
    ]


@pytest.mark.parametrize(
    ("now", "refused"),
    [
        (_record([_A, _B], [{"from_sequence": 63, "weights": [1, 1]}]), "data.phases[0]: was absent and is"),
        (_record([_A, ("b", 0.5, "db")]), "data.sources: was weights [1.0, 0.0], seq_len 8 from sequence 0 and is"),
    ],
)
def test_what_would_change_the_past_is_refused(now: dict, refused: str) -> None:
    change = data_change(_record([_A]), now, 64)
    assert len(change.refused) == 1 and change.refused[0].startswith(refused)


def test_a_source_that_is_gone_is_refused() -> None:
    assert (
        data_change(_record([_A, _B]), _record([_A]), 1).refused[0].startswith("data.sources[1] was b and is missing")
    )


def test_another_corpus_is_refused_with_both_names() -> None:
    change = data_change(_record([_A]), _record([("c", 1.0, "dc")]), 1)
    assert change.replaced == ["data.sources[0]: the run read a (da), but c is dc"]


def test_a_moved_corpus_is_the_same() -> None:
    change = data_change(_record([_A]), _record([("elsewhere/a", 1.0, "da")]), 1)
    assert change.refused == change.replaced == change.appended == []


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_on(mesh, config)


def test_a_run_meets_another_corpus_and_goes_on_when_allowed(prepared: Prepared, tmp_path: Path) -> None:
    begun = small_run(prepared, tmp_path / "run", training={"stop_at_step": 2})
    run_ranks(begun.parallel, 1, _train, begun)
    other = tmp_path / "other"
    prepare(
        [str(prepared.source)],
        other,
        prepared.tokenizer_path,
        validation_fraction=0.3,
        shard_tokens=40_000,
        processes=1,
    )
    changed = small_run(prepared, tmp_path / "run", data={"sources": [{"corpus": str(other)}]})
    record = run_record(changed, open_sources(changed.data, changed.folder.corpora))
    (problem,) = check_run_dir(changed, record, allow_data_change=False, allow_fresh_start=False)
    assert str(prepared.folder) in problem and str(other) in problem and "--allow-data-change" in problem
    assert check_run_dir(changed, record, allow_data_change=True, allow_fresh_start=False) == []
    run_ranks(changed.parallel, 1, _train, changed)
    history = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    (event,) = (event for event in history if event["event"] == "data replaced")
    assert event["step"] == 2
    assert str(other) in event["details"]["changes"][0]


def test_inspect_data_shows_the_batch_that_is_read(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path / "run", data={"seq_len": 512, "packing": "best_fit"})
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    result = CliRunner().invoke(app, ["inspect", "data", str(file), "--at", "3"])
    assert result.exit_code == 0, result.output
    assert "step 3: sequences 16 to 24 of 512 tokens, seed 5" in result.output
    assert result.output.count("== sequence ") == 8
    late = CliRunner().invoke(app, ["inspect", "data", str(file), "--at", "999999999999999999999"])
    assert "but the run has" in str(late.exception)
    shown = [part.partition("\n")[2] for part in result.output.split("\n-- shard-")[1:]]
    texts = [text.partition("\n== sequence")[0].removesuffix("\n") for text in shown]
    assert len(texts) > 8 and sum(text in prepared.texts for text in texts) > len(texts) / 2
    assert CliRunner().invoke(app, ["inspect", "--verify", str(prepared.folder)]).exit_code == 0
