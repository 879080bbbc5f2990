"""`prepare` gives one corpus whatever the processes, and all of it or nothing."""

import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_scripts import benchmark
from small_corpora import Prepared

from triplane.data import content, encode
from triplane.data.blocks import BLOCK_CHARS
from triplane.data.corpus import Corpus
from triplane.data.dedupe import Dedupe
from triplane.data.holdout import text_and_its_end
from triplane.data.inspect import describe
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.prepare import Progress, prepare
from triplane.data.report import Rejected, Report
from triplane.data.sources import find_files
from triplane.storage.errors import DataError


def test_a_name_that_is_not_utf8_is_no_obstacle(prepared: Prepared, tmp_path: Path) -> None:
    for number, name in enumerate((b"caf\xe9.txt", b"2.txt")):
        with open(os.fsencode(tmp_path) + b"/" + name, "w") as file:
            file.write(f"text {number}")
    out = tmp_path / "out"
    model = prepared.folder / "tokenizer.model"
    prepare([str(tmp_path)], out, model, validation_fraction=0.5, shard_tokens=40_000, processes=1)
    assert {describe(out, 1)[split]["documents"] for split in ("train", "validation")} == {1}


def _prepare(prepared: Prepared, out: Path, processes: int = 1, fraction: float = 0.1) -> Report:
    model = prepared.folder / "tokenizer.model"
    return prepare(
        [str(prepared.source)], out, model, validation_fraction=fraction, shard_tokens=40_000, processes=processes
    )


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("processes", [1, 3])
def test_any_number_of_processes_writes_the_same_bytes(prepared: Prepared, tmp_path: Path, processes: int) -> None:
    report = _prepare(prepared, tmp_path / "out", processes)
    assert report == prepared.report
    assert _contents(tmp_path / "out") == _contents(prepared.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_report_counts_what_was_written_and_rejected(prepared: Prepared, tmp_path: Path) -> None:
    source = tmp_path / "mixed"
    source.mkdir()
    for i in range(50):
        (source / f"{i}.txt").write_text(f"text {i} " * 20)
    (source / "bad.txt").write_bytes(b"\xff\xfe")
    seen: list[Progress] = []
    out, model = tmp_path / "out", prepared.folder / "tokenizer.model"
    report = prepare(
        [str(source)], out, model, validation_fraction=0.3, shard_tokens=1000, processes=2, progress=seen.append
    )
    assert report.train.documents + report.validation.documents == 50
    text_bytes = sum(path.stat().st_size for path in source.iterdir()) - 2
    assert report.train.text_bytes + report.validation.text_bytes == text_bytes
    tokens = report.train.tokens + report.validation.tokens
    assert seen[-1] == Progress(
        documents=50, text_bytes=text_bytes, tokens=tokens, read_bytes=text_bytes + 2, total_bytes=text_bytes + 2
    )
    bad = f"{source}/bad.txt"
    assert report.rejected == {"not utf-8": Rejected(count=1, first=f"{bad}: invalid start byte at byte 0")}
    lines = (out / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"name": bad, "reason": "not utf-8: invalid start byte at byte 0"}]
    assert Report.model_validate_json((out / "report.json").read_bytes()) == report
    for counts, corpus in ((report.train, Corpus(out / "train")), (report.validation, Corpus(out / "validation"))):
        powers = [length.bit_length() - 1 for length in corpus.document_lengths().tolist()]
        assert counts.lengths == [powers.count(power) for power in range(max(powers) + 1)]
    assert report.train.bytes_per_token == report.train.text_bytes / report.train.tokens


def test_copies_of_a_document_are_all_in_one_split(prepared: Prepared, tmp_path: Path) -> None:
    source = tmp_path / "copies.jsonl"
    source.write_text("".join(json.dumps({"text": f"copy {i % 40}"}) + "\n" for i in range(400)))
    prepare(
        [str(source)],
        tmp_path / "out",
        prepared.folder / "tokenizer.model",
        validation_fraction=0.3,
        shard_tokens=40_000,
        processes=1,
    )
    train, validation = (
        set(describe(tmp_path / "out", 400)[split]["first_documents"]) for split in ("train", "validation")
    )
    assert len(train) + len(validation) == 40 and not train & validation


def test_the_same_corpus_is_reused_and_another_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not _prepare(prepared, out).reused
    before = _contents(out)
    again = _prepare(prepared, out)
    assert again.reused and again.train == prepared.report.train
    with pytest.raises(DataError, match=r"out: contains a corpus with validation_fraction 0\.1 and not 0\.2: name"):
        _prepare(prepared, out, fraction=0.2)
    (out / "train" / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar: damaged"):
        _prepare(prepared, out)
    assert before.keys() - _contents(out).keys() == {"train/shard-000000.tar"}


def test_a_folder_with_other_files_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(DataError, match="is not a finished corpus"):
            _prepare(prepared, out)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["", '{"text": "a"}\n', '{"text": "same"}\n' * 3, "{\n"])
def test_too_few_documents_are_refused(prepared: Prepared, tmp_path: Path, content: str) -> None:
    source = tmp_path / "few.jsonl"
    source.write_text(content)
    with pytest.raises(DataError, match=r"out: [013] documents for training and [013] for validation"):
        prepare(
            [str(source)],
            tmp_path / "out",
            prepared.folder / "tokenizer.model",
            validation_fraction=0.5,
            shard_tokens=1000,
            processes=1,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]


def test_a_validation_fraction_is_a_fraction(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"validation_fraction must be between 0 and 1, is 1\.5"):
        _prepare(prepared, tmp_path / "out", fraction=1.5)


_SCRIPT = """
import sys
from pathlib import Path
from triplane.data.prepare import prepare
source, out, model = sys.argv[1:]
settings = {"validation_fraction": 0.1, "shard_tokens": 40_000, "processes": 2}
prepare([source], Path(out), Path(model), **settings, progress=lambda now: print(*now, flush=True))
"""


def test_a_full_disk_is_an_error_and_leaves_nothing(prepared: Prepared, tmp_path: Path) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"mount -t tmpfs -o size=64k none {tmp_path} && $0"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a file system")
    script = f"'{sys.executable}' -c '{_SCRIPT}' '{prepared.source}' out/corpus '{prepared.folder}/tokenizer.model'"
    mount[-1] = mount[-1].replace("$0", f"mkdir {tmp_path}/out; cd {tmp_path}; {script}; find .")
    done = subprocess.run(mount, capture_output=True, text=True, env=os.environ)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("triplane.storage.errors.StorageError: ")
    assert "the disk is full: " in error and " needed, " in error and "bytes free" in error
    assert done.stdout.splitlines()[-2:] == [".", "./out"]


def test_a_killed_run_leaves_no_corpus_and_no_process(prepared: Prepared, tmp_path: Path) -> None:
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(20) for text in prepared.texts))
    out, model = tmp_path / "out", prepared.folder / "tokenizer.model"
    command = [sys.executable, "-c", _SCRIPT, str(big), str(out), str(model)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() and run.stdout.readline()  # the start, and a chunk
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(workers) == 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists()
    deadline = time.monotonic() + 10
    while any(map(_is_running, workers)):
        assert time.monotonic() < deadline, "the workers outlive the run"
        time.sleep(0.05)
    report = prepare([str(big)], out, model, validation_fraction=0.1, shard_tokens=40_000, processes=2)
    assert report.train.documents + report.validation.documents == 20 * len(prepared.texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.jsonl", "out"]


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_describe(prepared: Prepared) -> None:
    description = describe(prepared.folder, show_documents=2)
    train = description["train"]
    assert train["documents"] == prepared.report.train.documents and train["tokens"] == prepared.report.train.tokens
    assert train["digest"] == prepared.train.digest and description["tokenizer_digest"] == prepared.tokenizer.digest
    assert train["document_tokens_percentiles"][100] == prepared.train.document_lengths().max()
    assert len(train["first_documents"]) == 2 and set(train["first_documents"]) <= set(prepared.texts)
    assert "first_documents" not in describe(prepared.folder)["train"]


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.98])
def test_each_split_has_a_document_of_any_number(prepared: Prepared, tmp_path: Path, fraction: float) -> None:
    model = prepared.folder / "tokenizer.model"
    for count in (1, 2, 3, 5):
        texts = [f"document {i}\nof {count}" for i in range(count)]
        source, out = tmp_path / f"{count}.jsonl", tmp_path / f"out{count}"
        copies = [json.dumps({"text": text}) + "\n" for text in texts for _ in range(2 if count == 3 else 1)]
        source.write_text("".join(copies))
        report = prepare([str(source)], out, model, validation_fraction=fraction, shard_tokens=1000, processes=1)
        described = describe(out, 10)
        splits = {name: described[name]["first_documents"] for name in ("train", "validation")}
        assert splits["train"] and splits["validation"] and not set(splits["train"]) & set(splits["validation"])
        assert report.validation_is_end == (count == 1)
        if count > 1:
            assert {text for texts in splits.values() for text in texts} == set(texts)
        else:
            assert splits["train"] + splits["validation"] in (
                ["document 0\n", "of 1"], ["document", " 0\nof 1"], ["d", "ocument 0\nof 1"]
            )  # fmt: skip
        for name, counts in (("train", report.train), ("validation", report.validation)):
            assert counts.documents == described[name]["documents"] and counts.tokens == described[name]["tokens"]
            assert counts.text_bytes == described[name]["text_bytes"] == sum(len(text) for text in splits[name])
            assert sum(counts.lengths) == counts.documents


@pytest.mark.parametrize("name", ["long.txt", "enwik"])
def test_the_end_of_a_long_text_is_held_out_however_many_shards_it_fills(
    name: str, prepared: Prepared, tmp_path: Path
) -> None:
    lines = [f"line {i} of a text that is longer than a document which is held in memory\n" for i in range(60_000)]
    text = "".join(lines)
    (tmp_path / name).write_text(text)
    model = open_tokenizer(prepared.folder / "tokenizer.model")
    report = prepare(
        [str(tmp_path / name)],
        tmp_path / "out",
        prepared.folder / "tokenizer.model",
        validation_fraction=0.1,
        shard_tokens=100_000,
        processes=1,
    )
    parts = []
    for split in ("train", "validation"):
        corpus = Corpus(tmp_path / "out" / split)
        assert corpus.manifest.documents == 1
        parts.append(model.decode(corpus.read(0, corpus.manifest.tokens)[0].tolist()))
    assert "".join(parts) == text
    assert parts[0].endswith("\n") and parts[1].startswith("line ")
    assert 0.1 <= len(parts[1]) / len(text) < 0.1001
    assert report.validation_is_end and (report.train.documents, report.validation.documents) == (1, 1)
    assert report.train.text_bytes + report.validation.text_bytes == len(text)


@pytest.mark.parametrize(("unit", "first"), [("ein Wort ", " "), ("語", "語")])
def test_the_end_of_a_long_text_without_line_ends_begins_with_a_word_or_character(
    unit: str, first: str, tmp_path: Path
) -> None:
    (tmp_path / "long").write_text(unit * (5_000_000 // len(unit.encode())))
    (file,) = find_files([str(tmp_path / "long")], print)
    text, end = text_and_its_end(file, 0.1, most_bytes=1 << 28)
    assert text.part is not None and end.part is not None and text.part.stop == end.part.start
    content = (tmp_path / "long").read_bytes()[end.part.start :]
    assert content.decode().startswith(first)
    assert 0 <= len(content) - 500_000 < 20


def test_a_document_too_long_to_cut_is_told(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("holdout", "prepare"):
        monkeypatch.setattr(f"triplane.data.{module}.MOST_TOKENS", 10)
    (tmp_path / "long.txt").write_text("some words " * 50)
    model = prepared.folder / "tokenizer.model"
    with pytest.raises(DataError, match="the only document is over 10 tokens, too long to cut: split the file; give"):
        prepare(
            [str(tmp_path / "long.txt")],
            tmp_path / "out",
            model,
            validation_fraction=0.1,
            shard_tokens=1000,
            processes=1,
        )


def test_nothing_is_held_out_of_a_split_with_a_finished_shard(prepared: Prepared, tmp_path: Path) -> None:
    texts = ["a copy", *(f"document {i} " * 50 for i in range(20)), "a copy"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = prepared.folder / "tokenizer.model"
    for fraction, advice in ((1e-9, "raise"), (1 - 1e-9, "lower")):
        with pytest.raises(DataError, match=rf"each split needs one: {advice} validation_fraction; give more text"):
            prepare(
                [str(tmp_path / "a.jsonl")],
                tmp_path / "out",
                model,
                validation_fraction=fraction,
                shard_tokens=1000,
                processes=1,
            )


def test_a_full_disk_under_a_long_document_is_reported(prepared: Prepared, tmp_path: Path) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"mount -t tmpfs -o size=9m none {tmp_path} && $0"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a file system")
    script = f"yes some words | head -c 8400000 > {tmp_path}/long.txt; '{sys.executable}' -c '{_SCRIPT}' "
    script += f"{tmp_path}/long.txt {tmp_path}/out '{prepared.folder}/tokenizer.model'"
    mount[-1] = mount[-1].replace("$0", script)
    done = subprocess.run(mount, capture_output=True, text=True, env=os.environ)
    error = done.stderr.strip().splitlines()[-1]
    assert "DataError: " in error and "long.txt: " in error and "a temporary file: the disk is full" in error


def test_a_folder_that_cannot_be_replaced_is_found_first(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    _prepare(prepared, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and _contents(tmp_path / "real") == _contents(prepared.folder)
    (tmp_path / "loop").symlink_to("loop")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for out, message in ((Path("."), "contains the working folder"), (tmp_path / "loop", "cannot be written")):
        with pytest.raises(DataError, match=message):
            prepare(
                ["nowhere"],
                out,
                prepared.folder / "tokenizer.model",
                validation_fraction=0.1,
                shard_tokens=1000,
                processes=1,
            )
    monkeypatch.setattr(Path, "is_mount", lambda self: self == here)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is a mount point"):
        prepare(
            ["nowhere"],
            here,
            prepared.folder / "tokenizer.model",
            validation_fraction=0.1,
            shard_tokens=1000,
            processes=1,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "loop", "real"]


def test_a_long_document_is_encoded_in_parts(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (content, encode):
        monkeypatch.setattr(module, "LONG_BYTES", 100_000)
    text = "".join(f"{i}: {text}\n" for i in range(2) for text in prepared.texts)
    assert len(text) > 2 * BLOCK_CHARS
    source = tmp_path / "source"
    source.mkdir()
    (source / "long.txt").write_text(text)
    (source / "row.jsonl").write_text(json.dumps({"text": text + "2"}) + "\n" + json.dumps({"text": "short"}))
    (source / "bad.txt").write_bytes(text.encode() + b"\xff")
    (source / "run.txt").write_text("e" * 2_300_000)
    model = prepared.folder / "tokenizer.model"
    cases: tuple[tuple[Dedupe, int], ...] = (("none", 2), ("near", 1))
    for dedupe, processes in cases:
        out = tmp_path / dedupe
        report = prepare(
            [str(source)], out, model, validation_fraction=0.3, shard_tokens=100_000, processes=processes, dedupe=dedupe
        )
        documents = [text for split in ("train", "validation") for text in describe(out, 9)[split]["first_documents"]]
        assert sorted(documents) == sorted([text, "short"] + [text + "2"] * (dedupe == "none"))
        reasons = {reason: rejected.first for reason, rejected in report.rejected.items()}
        assert reasons["not utf-8"] == f"{source}/bad.txt: invalid start byte at byte {len(text.encode())}"
        assert reasons["no place to cut it"].startswith(f"{source}/run.txt")
        assert ("near duplicate" in reasons) == (dedupe == "near")
    report = prepare(
        [str(source)],
        tmp_path / "few",
        model,
        validation_fraction=0.3,
        shard_tokens=1000,
        processes=1,
        max_document_bytes=200_000,
    )
    assert report.train.documents + report.validation.documents == 2  # of "short", its end is held out
    reason = "longer than 200,000 bytes, the limit of a document or row"
    assert report.rejected[reason].count == 4


def test_memory_is_bounded_by_the_block(prepared: Prepared, tmp_path: Path) -> None:
    measured = benchmark("prepare_memory").measured
    source = tmp_path / "source"
    source.mkdir()
    (source / "long.txt").write_text("".join(f"{i}: {text}\n" for i in range(70) for text in prepared.texts))
    (source / "short.txt").write_text("a text")
    assert (source / "long.txt").stat().st_size > 12_000_000
    with gzip.open(source / "bomb.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b"a b " * 250_000)
    command = [sys.executable, "-m", "triplane", "prepare", str(source), "--out", str(tmp_path / "out")]
    command += ["--tokenizer", str(prepared.folder / "tokenizer.model"), "--processes", "1"]
    status, _, peak_bytes = measured(command)
    assert status == 0 and peak_bytes < 450 << 20, f"{peak_bytes >> 20} MiB"
    assert "bomb" in (tmp_path / "out" / "rejected.jsonl").read_text()


def test_too_few_files_are_told(prepared: Prepared, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "triplane", "prepare", str(prepared.source), "--out", str(tmp_path / "out")]
    command += ["--tokenizer", str(prepared.folder / "tokenizer.model"), "--processes", "30"]
    limited = ["sh", "-c", f"ulimit -n 64; exec {shlex.join(command)}"]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "ulimit -n" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
