"""The commands as a user runs them: real processes, real files, exit codes, one line for a mistake."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from commands import triplane
from runs import small_run
from small_corpora import Prepared

from triplane.config.toml import to_toml
from triplane.storage.locks import locked_folder


def started(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user does."""
    command = [sys.executable, "-m", "triplane", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """Returns the message of a mistake, after checking exit code 2 and no traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folder(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config `small.toml` and a run of it on two ranks that the launcher started, stopped and resumed."""
    folder = tmp_path_factory.mktemp("commands")
    config = small_run(prepared, Path("run"), parallel={"dp": 2})
    (folder / "small.toml").write_text(to_toml(config))
    first = started("train", "small.toml", "training.stop_at_step=5", cwd=folder)
    assert first.returncode == 0, first.stderr
    assert "dp 2, zero 1, fp32 on cpu; starting from initial weights" in first.stdout
    assert "step 5/8" in first.stdout
    assert first.stderr == ""
    second = started("train", "small.toml", cwd=folder)
    assert second.returncode == 0, second.stderr
    assert "resuming from run/checkpoints/step_5" in second.stdout
    assert "step 8: validation loss" in second.stdout
    return folder


def test_a_run_leaves_a_report(folder: Path) -> None:
    written = (folder / "run/report.html").read_text()
    assert "<b>8</b><span>of 8 steps" in written
    assert "; completed; written" in written
    assert triplane("report", "run", "--out", "again.html", cwd=folder).stdout == "again.html\n"
    assert (folder / "again.html").exists()
    assert "not a run folder" in refused(triplane("report", ".", cwd=folder))
    assert "give another file by --out" in refused(triplane("report", "run", "--out", "no/a.html", cwd=folder))


def test_a_finished_run_says_so(folder: Path) -> None:
    again = triplane("train", "small.toml", "parallel.dp=1", cwd=folder)
    assert again.returncode == 0
    assert "step 8 of 8 is done" in again.stdout


def test_evaluate_prints_the_loss_beside_a_unigram_models(folder: Path) -> None:
    result = triplane("evaluate", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    figures = [float(figure) for figure in re.findall(r" (\d+\.\d{4}) ", result.stdout)]
    nats, bits_per_byte, unigram_nats = figures
    assert nats > bits_per_byte > 0 and unigram_nats > 0


def test_generate_continues_the_prompt_the_same_way_each_time(folder: Path) -> None:
    one, two = (triplane("generate", "run", "--prompt", "1: a", "--tokens", 8, cwd=folder) for _ in range(2))
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout
    assert one.stdout.startswith("1: a")


def test_prepare_tells_what_it_holds_out(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("\n".join(prepared.texts))
    options = ("--tokenizer", prepared.folder / "tokenizer.model")
    for _ in range(2):  # the second time, it is there already
        one = triplane("prepare", "input.txt", "--out", "one", *options, cwd=tmp_path)
        last = one.stdout.splitlines()[-1]
        assert one.returncode == 0 and last.startswith("held out for validation: the end of the only document, ")
        assert one.stdout.startswith("one: ")  # a pipe gets no empty line for the bar
    figures = re.search(r", ([0-9,]+) of ([0-9,]+) tokens \(([0-9.]+) %\)$", last)
    assert figures is not None
    held, total, percent = (float(figure.replace(",", "")) for figure in figures.groups())
    assert percent == round(100 * held / total, 1) and 1 < percent < 3
    many = triplane("prepare", prepared.source, "--out", "many", *options, cwd=tmp_path)
    documents = prepared.report.train.documents + prepared.report.validation.documents
    assert f" of {documents:,} documents, " in many.stdout.splitlines()[-1]
    missing = triplane("prepare", "nowhere", "--out", "none", *options, cwd=tmp_path)
    assert refused(missing).count("\n") == 1 and missing.stdout == ""


def test_export_and_inspect(folder: Path, prepared: Prepared) -> None:
    exported = triplane("export", "run", "out", "--dtype", "fp32", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    assert "by transformers" in exported.stdout
    assert (folder / "out/model.safetensors").exists()
    checkpoint = triplane("inspect", "run", "--verify", cwd=folder)
    assert "step 8" in checkpoint.stdout
    assert "all checksums of tensors match" in checkpoint.stdout
    corpus = triplane("inspect", prepared.folder, "--verify", cwd=folder)
    assert corpus.returncode == 0, corpus.stderr
    assert "validation" in corpus.stdout


def test_one_rank_needs_no_launcher(folder: Path) -> None:
    for zero in (0, 1):
        result = triplane(
            "train", "small.toml", f"run_dir=one{zero}", "parallel.dp=1", f"parallel.zero={zero}", cwd=folder
        )
        assert result.returncode == 0, result.stderr
        assert "step 8/8" in result.stdout


def test_a_run_folder_in_use_may_be_free_later(folder: Path) -> None:
    with locked_folder(folder / "run", wait=False):
        result = triplane("train", "small.toml", cwd=folder)
    assert result.returncode == 75
    assert result.stderr == "triplane: run: in use by another process: wait for it to end\n"


def test_raw_tars_are_tokenized_once_and_trained_on(folder: Path, prepared: Prepared) -> None:
    with webdataset.TarWriter(str(folder / "raw.tar")) as tar:
        for number, text in enumerate(prepared.texts[:400]):
            tar.write({"__key__": f"{number:06d}", "txt": text})
    arguments = ("train", "small.toml", "data.sources=[{corpus='raw.tar'}]", "run_dir=raw", "parallel.dp=1")
    without = triplane(*arguments, cwd=folder)
    assert "raw.tar: tars require data.tokenizer" in refused(without)
    tokenizer = f"data.tokenizer={prepared.folder / 'tokenizer.model'}"
    first = triplane(*arguments, tokenizer, "training.stop_at_step=4", cwd=folder)
    assert first.returncode == 0, first.stderr
    (corpus,) = (folder / "raw/corpora").iterdir()
    written_ns = (corpus / "train/manifest.json").stat().st_mtime_ns
    second = triplane(*arguments, tokenizer, cwd=folder)
    assert "resuming from raw/checkpoints/step_4" in second.stdout, second.stderr
    assert (corpus / "train/manifest.json").stat().st_mtime_ns == written_ns


def test_a_layout_that_does_not_fit_the_ranks_shows_its_operands(folder: Path) -> None:
    first_of_two: dict[str, Any] = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    result = triplane("train", "small.toml", "parallel.tp=2", "parallel.dp=3", cwd=folder, **first_of_two)
    assert "dp (3) x tp (2) x pp (1) = 6, but 2 ranks" in refused(result)


def test_the_environment_is_checked_before_the_run_folder_is_written(folder: Path) -> None:
    arguments = ("train", "small.toml", "run_dir=elsewhere", "parallel.dp=1")
    many = refused(triplane(*arguments, cwd=folder, OMP_NUM_THREADS="many"))
    assert many == "triplane: OMP_NUM_THREADS is 'many'; set a whole number\n"
    abc = refused(triplane(*arguments, cwd=folder, RANK="abc"))
    assert abc.startswith("triplane: RANK is 'abc', but no launcher started ranks")
    command = [sys.executable, "-m", "triplane", *arguments]
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40))
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, preexec_fn=few)
    assert (
        refused(result) == "triplane: 1 rank: 52 open files are needed, but the limit is 40: raise it (`ulimit -n`)\n"
    )
    assert not (folder / "elsewhere").exists()
    lifted = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (20, 4096))
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, preexec_fn=lifted)
    assert result.returncode == 0, result.stderr


def test_a_seed_that_no_generator_holds_is_refused(folder: Path) -> None:
    assert "less than or equal to" in refused(triplane("generate", "run", "--seed", 2**64, cwd=folder))


def test_a_terminal_shows_the_same_text_as_it_is_sampled(folder: Path) -> None:
    command = [sys.executable, "-m", "triplane", "generate", "run", "--prompt", "東 :smile: [b]", "--tokens", "40"]
    piped = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    chunks = []
    with suppress(OSError):  # Linux's way to say that the terminal is closed
        while chunk := os.read(ours, 1 << 16):
            chunks.append(chunk)
    os.close(ours)
    assert process.wait() == 0
    assert b"".join(chunks).decode().replace("\r\n", "\n") == piped
    assert piped.startswith("東 :smile: [b]") and len(chunks) > 10  # one write for each part


@pytest.mark.parametrize(
    "arguments", [("--version",), ("status", "run"), ("config", "--schema"), ("train", "small.toml", "run_dir=full")]
)
def test_output_to_a_full_disk_is_one_line(folder: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "triplane", *arguments]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "triplane: standard output cannot be written: No space left on device; write it elsewhere\n"
    assert (result.returncode, result.stderr) == (2, said)


def test_text_that_the_terminal_cannot_show_is_escaped(folder: Path) -> None:
    command = [sys.executable, "-m", "triplane", "generate", "run", "--prompt", "東", "--tokens", "1"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=ascii_only)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("\\u6771")


def test_closed_streams_do_not_matter(folder: Path) -> None:
    for closed, command in (("<&- >&- 2>&-", "train small.toml run_dir=silent parallel.dp=1"), (">&-", "status run")):
        line = f"{sys.executable} -m triplane {command} {closed}"
        result = subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and result.stderr == ""
    assert (folder / "silent/DONE").exists()


def test_evaluate_without_the_corpus_says_how_to_give_another(folder: Path, prepared: Prepared) -> None:
    arguments = ("train", "small.toml", "run_dir=away", "parallel.dp=1", "data.sources=[{corpus='lent'}]")
    (folder / "lent").symlink_to(prepared.folder)
    assert triplane(*arguments, cwd=folder).returncode == 0
    (folder / "lent").unlink()
    away = refused(triplane("evaluate", "away", cwd=folder))
    assert away.endswith("; or give a corpus to read in its place by --corpus\n")
    assert triplane("evaluate", "away", "--corpus", prepared.folder, cwd=folder).returncode == 0


MISTAKES = {
    "a name too long": ([f"run_dir={'a' * 300}"], f"{'a' * 300}/config.toml: File name too long"),
    "no name": (['run_dir="a\\u0000b"'], "override: run_dir: contains unprintable characters"),
    "unknown key": (["model.n_headz=4"], "override: model.n_headz: unknown key; did you mean n_heads?"),
    "heads": (["parallel.tp=8"], "n_heads (4) is not a multiple of tp (8); the next multiple is 8"),
    "layers": (["parallel.pp=4"], "pp (4) x virtual_stages (1) = 4 stages need at least 3 layers, but n_layers is 2"),
    "batch": (
        ["training.global_batch_size=6"],
        "global_batch_size (6) is not a multiple of dp (2) x micro_batch_size (2) = 4",
    ),
    "another tokenizer": (["model.vocab_size=512"], "model.vocab_size is 512, but the tokenizer of"),
    "no corpus": (["data.sources=[{corpus='nowhere'}]"], "nowhere"),
    "another run": (["seed=6"], "belongs to another run: seed is 5 there and 6 here; set another run_dir"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU fp8 may be there")
def test_fp8_is_refused_where_there_is_none(folder: Path) -> None:
    changes = ["parallel.fp8=true", "training.precision='bf16'", "parallel.dp=1", "run_dir=eight"]
    message = refused(triplane("train", "small.toml", *changes, cwd=folder))
    assert message.endswith("requires GPUs of compute capability 8.9 or more, not a CPU; set parallel.fp8=false\n")


def test_prove_prints_a_table_and_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triplane.prove.rounding.SEEDS", range(4))
    result = triplane("prove", "--ranks", "1", "--quick", "--json", "proof.json", cwd=tmp_path, PATH="")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "proof.json").read_text())
    assert len(rows) > 1
    assert not any("compile" in row["layout"] for row in rows)  # there is no compiler on an empty path
    printed = result.stdout.splitlines()
    assert printed[0] == "torch.compile lacks a compiler (g++): skipping layouts with compile"
    assert [line.split("  ")[-1] for line in printed[2:-1]] == [row["layout"] for row in rows]
    assert all(line.startswith("ok ") for line in printed[2:-1])
    assert printed[-1] == f"{len(rows)} of {len(rows)} layouts train the model that one process trains"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_any_rank_starts(name: str, folder: Path) -> None:
    overrides, message = MISTAKES[name]
    result = triplane("train", "small.toml", *overrides, cwd=folder)
    assert message in refused(result)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    result = triplane(
        "train",
        "small.toml",
        "parallel.pp=4",
        "training.global_batch_size=7",
        "data.sources=[{corpus='no'}]",
        cwd=folder,
    )
    assert len(refused(result).splitlines()) >= 3


@pytest.fixture
def damaged(folder: Path, prepared: Prepared, tmp_path: Path) -> Path:
    copy = tmp_path / "corpus"
    shutil.copytree(prepared.folder, copy)
    return copy


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_shard_is_named(damage: str, damaged: Path, folder: Path) -> None:
    shard = sorted((damaged / "train").glob("*.tar"))[0]
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 512)
    result = triplane("train", "small.toml", f"data.sources=[{{corpus='{damaged}'}}]", "run_dir=other", cwd=folder)
    assert shard.name in refused(result)
    assert not (folder / "other").exists()


COMMANDS = [
    (),
    ("tokenizer",),
    *((name,) for name in ("prepare", "train", "submit", "status", "evaluate", "generate", "export", "inspect")),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_needs_no_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys; from triplane.launcher.cli import app\n"
        f"try: app([*{command!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'triplane.config.load'} & sys.modules.keys()"
    )
    best_s = float("inf")
    for _ in range(6):  # a busy machine slows even the time of a core
        start_s = sum(os.times()[2:4])  # of children
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        best_s = min(best_s, sum(os.times()[2:4]) - start_s)
        if best_s < 0.5:
            break
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
    assert best_s < 0.5
