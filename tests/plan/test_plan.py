"""`triplane plan` as a user runs it: what it prints, what it refuses, what it finds."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from runs import small_run
from small_corpora import Prepared

from triplane.checkpoint.manifest import Manifest, write_manifest
from triplane.config.load import load_config
from triplane.config.preflight import done_steps, run_record
from triplane.config.toml import to_toml
from triplane.data.opening import open_sources
from triplane.plan.disk import kept_checkpoints
from triplane.plan.estimate import estimate, phases, tokens_of
from triplane.plan.gate import examine
from triplane.plan.gpus import GPUS
from triplane.plan.search import changes, nearest, search

CONFIGS = Path(__file__).parents[2] / "configs"


def plan(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "triplane", "plan", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_a_run_without_a_fault(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(small_run(prepared, tmp_path / "run")))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = plan("run.toml", "--gpus", 1, "--json", "plan.json", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 5  # of a core, whatever else it does
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no problems" in result.stdout
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["problems"] == []
    assert record["tokens"] == 8 * 8 * 32
    memory = record["estimate"]["memory_bytes"]["every rank"]
    parts = ("weights", "gradients", "optimizer", "activations", "temporary")
    assert sum(memory[part] for part in parts) == memory["total"]
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_is_not_there_does_not_hide_the_rest(tmp_path: Path) -> None:
    result = plan(CONFIGS / "8b.toml", "run_dir=r", "checkpoint.keep_last=1", "--gpus", 64, cwd=tmp_path)
    assert result.returncode == 1
    assert "every rank" in result.stdout and "to the end" in result.stdout
    assert "corpora/web/train/manifest.json: No such file or directory" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "--gpu h1000: unknown; choose from a100, b200, h100"),
        (["--gpu", "mine.toml"], "--gpu mine.toml: bf16_tflops: missing"),
        (["--gpu", "none.toml"], "--gpu none.toml: No such file or directory"),
        (["parallel.tpp=2"], "override: parallel.tpp: unknown key; did you mean tp?"),
    ],
)
def test_what_cannot_be_planned_is_one_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "mine.toml").write_text("memory_gib = 24\nmemory_gb_per_s = 936\n")
    result = plan(CONFIGS / "125m.toml", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_fp8_on_a_gpu_without_it_is_a_problem(tmp_path: Path) -> None:
    result = plan(CONFIGS / "1b.toml", "parallel.fp8=true", "--gpu", "a100", cwd=tmp_path)
    assert "parallel.fp8 requires GPUs of compute capability 8.9 or more, not 8.0" in result.stdout


def test_a_time_limit_that_is_too_short_is_a_problem(tmp_path: Path) -> None:
    result = plan(CONFIGS / "8b.toml", "--gpus", 64, "--time-limit-days", 10, cwd=tmp_path)
    assert "days to the end, but --time-limit-days is 10, enough for" in result.stdout


def test_a_gpu_that_a_file_describes(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        "memory_gib = 24\nbf16_tflops = 71\nmemory_gb_per_s = 936\nnode_gb_per_s = 16\nnetwork_gb_per_s = 1\n"
        "price_per_hour = 0.3\n"
    )
    result = plan(CONFIGS / "125m.toml", "--gpus", 1, "--gpu", "mine.toml", cwd=tmp_path)
    assert "of 21.0 available per GPU" in result.stdout
    assert "at $0.3 for a GPU hour\n" in result.stdout
    with (tmp_path / "mine.toml").open("a") as file:
        file.write('currency = "CHF"\n')
    result = plan(CONFIGS / "125m.toml", "--gpus", 1, "--gpu", "mine.toml", cwd=tmp_path)
    assert re.search(r"\ncost +[\d,]+ CHF at 0\.3 CHF for a GPU hour\n", result.stdout)


def test_costs_have_a_currency(tmp_path: Path) -> None:
    config = CONFIGS / "125m.toml"
    ours, theirs = (
        plan(config, *given, "--json", "plan.json", cwd=tmp_path) for given in ([], ["--price", 2, "--currency", "EUR"])
    )
    guess = r"\ncost +\$[\d,]+ at \$2\.5 for a GPU hour, a guess: set yours with --price\n"
    assert re.search(guess, ours.stdout)
    assert re.search(r"\ncost +[\d,]+ EUR at 2 EUR for a GPU hour\n", theirs.stdout)
    assert json.loads((tmp_path / "plan.json").read_text())["estimate"]["currency"] == "EUR"
    alone = plan(config, "--currency", "EUR", cwd=tmp_path)
    assert (alone.returncode, alone.stderr) == (
        2,
        "triplane: --currency EUR: give the price of a GPU hour in it, by --price\n",
    )
    empty = plan(config, "--price", 2, "--currency", "", cwd=tmp_path)
    assert (empty.returncode, empty.stderr) == (2, 'triplane: --currency "": empty; give a code, such as EUR\n')


def test_all_problems_come_together(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(
        prepared,
        tmp_path,
        model={"vocab_size": 99, "head_dim": 7, "n_layers": 10_000, "hidden_dim": 1_000_000},
        schedule={"warmup_steps": 20},
    )
    text = "\n".join(examine(config, ranks=1).problems)
    assert "head_dim (7) x fraction (1) is 7" in text
    assert "warm-up (20 steps) is longer than the run (8 steps)" in text
    assert "model.vocab_size is 99, but the tokenizer" in text
    assert "3 checkpoints of" in text and "GiB are free" in text


def test_what_has_nothing_to_do_with_the_layout_does_not_hide_the_rest(tmp_path: Path) -> None:
    result = plan(
        CONFIGS / "8b.toml", "schedule.warmup_steps=999_999", "model.head_dim=127", "--gpus", 64, cwd=tmp_path
    )
    assert "warm-up (999999 steps) is longer than the run" in result.stdout
    assert "head_dim (127) x fraction (1) is 127" in result.stdout
    assert "to the end" in result.stdout and "layout" not in result.stdout.splitlines()[-1]


def test_a_checkpoint_of_another_run_is_a_problem(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "damaged_step_3").mkdir(parents=True)
    assert "no checkpoint is whole" in "\n".join(examine(small_run(prepared, tmp_path), ranks=1).problems)


def test_a_run_that_goes_on_is_planned_from_its_checkpoint(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path)
    folder = tmp_path / "checkpoints" / "step_6"
    folder.mkdir(parents=True)
    record = run_record(config, open_sources(config.data, config.folder.corpora))
    write_manifest(folder, Manifest({"step": 6, "consumed_sequences": 48, "tokens_seen": 0, "run": record}, [], {}))
    assert examine(config, ranks=1).problems == []
    assert done_steps(config) == 6
    whole, rest = (estimate(config, 1, GPUS["h100"], done_steps=done) for done in (0, 6))
    assert rest.total_s == pytest.approx(whole.total_s / 4)
    other = small_run(prepared, tmp_path, model={"n_layers": 3})
    assert any(
        "belongs to another run: model.n_layers is 2 there and 3 here" in line for line in examine(other, 1).problems
    )


def test_tars_are_looked_for_and_not_tokenized(prepared: Prepared, tmp_path: Path) -> None:
    config = small_run(prepared, tmp_path, data={"sources": [{"corpus": str(tmp_path / "no.tar")}], "tokenizer": "no"})
    assert (
        "data.tokenizer: no: cannot read this tokenizer: No such file or directory" in examine(config, ranks=1).problems
    )
    assert any("no.tar" in line for line in examine(config, ranks=1).problems)


def test_checkpoints_that_are_there_at_once() -> None:
    config = load_config(CONFIGS / "8b.toml", ["checkpoint.keep_last=2", "checkpoint.keep_every=100_000"])
    assert kept_checkpoints(config) == 2 + 4 + 1


def test_what_does_not_fit_comes_with_the_nearest_that_does(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "8b.toml", ["training.micro_batch_size=4", "parallel.recompute=none"])
    assert not estimate(config, 64, GPUS["h100"]).fits(GPUS["h100"])
    results = search(config, 64, GPUS["h100"])
    best = nearest(config, results.found)
    assert len(changes(config, best.config)) == 1
    assert estimate(best.config, 64, GPUS["h100"]).fits(GPUS["h100"])
    rates = [one.estimate.speed.tokens_per_s for one in results.found]
    assert rates == sorted(rates, reverse=True)
    assert sum(refusal.layouts for refusal in results.refused) > 0


def test_what_no_layout_can_do_is_said(tmp_path: Path) -> None:
    result = plan(CONFIGS / "405b.toml", "--gpus", 8, cwd=tmp_path)
    assert re.search(
        r"no layout of this model and batch fits 8 of these GPUs; most often: .*: needs [\d,.]+ GiB of", result.stdout
    )
    odd = plan(CONFIGS / "8b.toml", "--gpus", 8, "parallel.fp8=true", "model.hidden_dim=14340", cwd=tmp_path)
    assert (
        "fp8: hidden_dim (14340) is not a multiple of 16, which its kernels require"
        in odd.stdout.rpartition("most often")[2]
    )


def test_axes_need_not_be_powers_of_two() -> None:
    # 256 sequences over 48 GPUs: the factor 3 must be in an axis that does not split the batch.
    found = search(load_config(CONFIGS / "8b.toml"), 48, GPUS["h100"]).found
    assert found and all(one.config.parallel.pp % 3 == 0 for one in found)


def test_experts_and_states_spread_over_a_part_of_the_ranks() -> None:
    config = load_config(CONFIGS / "mixtral-8x7b.toml", ["training.precision=fp32", "training.micro_batch_size=1"])
    found = [one.config.parallel for one in search(config, 16, GPUS["h200"]).found]
    assert {layout.ep for layout in found} == {1, 2, 4, 8}
    shards = {(layout.tp, layout.dp_shard) for layout in found}
    assert {(1, None), (1, 8), (2, 4)} <= shards, shards  # those of a machine of 8
    assert all(layout.zero > 0 and layout.dp_shard * layout.tp == 8 for layout in found if layout.dp_shard)
    other = next(layout for layout in found if layout.ep != config.parallel.ep)
    assert f"parallel.ep={other.ep}" in changes(config, config.model_copy(update={"parallel": other}))
    alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"dp_shard": 8})})
    assert "parallel.dp_shard=none" in changes(alone, config)


def test_a_search_is_printed_and_written(tmp_path: Path) -> None:
    result = plan(CONFIGS / "8b.toml", "--gpus", 16, "--search", "--json", "plan.json", cwd=tmp_path)
    assert "layouts fit; the fastest:" in result.stdout
    assert "GiB of 76.2" in result.stdout  # why others do not
    first, *others = json.loads((tmp_path / "plan.json").read_text())["search"]
    lines = result.stdout.splitlines()
    assert lines[lines.index("the overrides of the fastest, to copy:") + 1] == " ".join(first["overrides"])
    assert len({"parallel.compile=false" in one["overrides"] for one in (first, *others)}) == 2
    recomputed = {word for one in others for word in one["overrides"] if word.startswith("parallel.recompute=")}
    assert len(recomputed) == 2  # besides the config's own
    best = plan(CONFIGS / "8b.toml", *first["overrides"], "--gpus", 16, "--json", "best.json", cwd=tmp_path)
    assert best.returncode == 1  # the corpus is not there
    found = json.loads((tmp_path / "best.json").read_text())["estimate"]
    assert found["speed"] == first["speed"]
    assert found["memory_bytes"] == first["memory_bytes"]


def test_time_and_tokens_follow_the_batch_sizes_of_a_ramp() -> None:
    half = ["training.steps=100", "training.batch_ramp=[{ after_steps = 50, global_batch_size = 512 }]"]
    small, both, large = (
        load_config(CONFIGS / "8b.toml", [*given, "schedule.warmup_steps=1"])
        for given in (["training.steps=100"], half, ["training.steps=100", "training.global_batch_size=512"])
    )
    assert list(phases(both, done_steps=20)) == [(30, 256, 8192), (50, 512, 8192)]
    assert 2 * tokens_of(both) == tokens_of(small) + tokens_of(large)
    first, ramp, last = (estimate(config, 64, GPUS["h100"]) for config in (small, both, large))
    assert 2 * ramp.total_s == pytest.approx(first.total_s + last.total_s)
    assert ramp.speed == last.speed and ramp.memory == last.memory


def test_time_follows_the_lengths_of_phases() -> None:
    plain = load_config(CONFIGS / "8b.toml")
    halves = load_config(
        CONFIGS / "8b.toml", ["data.phases=[{ from_sequence = 61_440_000, weights = [1], seq_len = 16384 }]"]
    )
    one, two = (estimate(config, 64, GPUS["h100"]) for config in (plain, halves))
    assert 1.5 < two.total_s / one.total_s < 2
    assert two.peak_gib > 1.2 * one.peak_gib
