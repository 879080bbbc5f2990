"""A preparer that is killed at random moments, and started again, writes what an uninterrupted one writes."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_corpora import Prepared

from triplane.data.corpus import Corpus
from triplane.data.dedupe import Dedupe
from triplane.data.prepare import prepare
from triplane.data.raw import ensure_corpus
from triplane.storage.errors import DataError

KILLS = 20


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _source(prepared: Prepared, folder: Path) -> Path:
    """Two files with duplicates and rejections in both."""
    source = folder / "source"
    source.mkdir()
    for part, copies in enumerate((range(4), range(2, 6))):
        rows = [json.dumps({"text": f"{copy} {text}"}) for copy in copies for text in prepared.texts[:500]]
        (source / f"{part}.jsonl").write_text("\n".join([*rows[:700], "{", *rows[700:]]))
    return source


def _prepare(source: Path, out: Path, model: Path) -> None:
    prepare([str(source)], out, model, validation_fraction=0.1, shard_tokens=8_000, processes=1, dedupe="exact")


def _prepare_in_session(source: Path, out: Path, model: Path) -> None:
    os.setsid()
    _prepare(source, out, model)


def test_twenty_kills_leave_no_trace(prepared: Prepared, tmp_path: Path) -> None:
    source, model = _source(prepared, tmp_path), prepared.folder / "tokenizer.model"
    whole = tmp_path / "whole"
    begin = time.monotonic()
    _prepare(source, whole, model)
    duration_s = time.monotonic() - begin
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    draw, fork = random.Random(7), multiprocessing.get_context("fork")
    commits, kills = set(), 0
    while kills < KILLS:
        run = fork.Process(target=_prepare_in_session, args=(source, out, model))
        run.start()
        run.join(draw.uniform(0.05, 0.5) * duration_s)
        if run.exitcode is None and run.pid is not None:
            os.kill(run.pid, signal.SIGKILL)
        run.join()
        kills += run.exitcode == -signal.SIGKILL
        assert run.exitcode in (0, -signal.SIGKILL)
        if out.exists():
            assert _contents(out) == _contents(whole)
            shutil.rmtree(out)
        if (partial / "journal.json").exists():
            commits.add((partial / "journal.json").read_bytes())
        if len(commits) < 2:
            duration_s *= 1.1  # the machine may be slower now
    assert len(commits) > 1, "no run went on from another"
    _prepare(source, out, model)
    assert _contents(out) == _contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "whole"]


def _interrupt(prepared: Prepared, tmp_path: Path, dedupe: Dedupe = "exact") -> tuple[Path, Path, Path]:
    """Leaves the partial folder of a run that stopped after some shards."""
    source, model, out = _source(prepared, tmp_path), prepared.folder / "tokenizer.model", tmp_path / "out"

    def stop(now: object) -> None:
        if (tmp_path / "out.partial" / "journal.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(
            [str(source)],
            out,
            model,
            validation_fraction=0.1,
            shard_tokens=8_000,
            processes=1,
            progress=stop,
            dedupe=dedupe,
        )
    return source, out, model


def test_near_duplicates_are_known_after_an_interruption(prepared: Prepared, tmp_path: Path) -> None:
    source, out, model = _interrupt(prepared, tmp_path, "near")
    resumed = prepare(
        [str(source)], out, model, validation_fraction=0.1, shard_tokens=8_000, processes=1, dedupe="near"
    )
    prepare(
        [str(source)],
        tmp_path / "whole",
        model,
        validation_fraction=0.1,
        shard_tokens=8_000,
        processes=2,
        dedupe="near",
    )
    assert _contents(out) == _contents(tmp_path / "whole")
    assert resumed.train.documents + resumed.validation.documents < 1000
    assert set(resumed.rejected) == {"exact duplicate", "near duplicate", "not JSON"}


def test_other_settings_or_inputs_do_not_go_on(prepared: Prepared, tmp_path: Path) -> None:
    source, out, model = _interrupt(prepared, tmp_path)
    with pytest.raises(DataError, match=r"out\.partial: was started with shard_tokens 8000 and not 9000: remove it"):
        prepare([str(source)], out, model, validation_fraction=0.1, shard_tokens=9_000, processes=1, dedupe="exact")
    (source / "0.jsonl").touch()
    with pytest.raises(DataError, match=r"out\.partial: was started with inputs_digest \w+ and not \w+: remove it"):
        _prepare(source, out, model)


def test_a_finished_shard_that_was_damaged_since_is_an_error(prepared: Prepared, tmp_path: Path) -> None:
    source, out, model = _interrupt(prepared, tmp_path)
    shard = tmp_path / "out.partial" / "corpus" / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-000000\.tar: damaged: expected SHA-256"):
        _prepare(source, out, model)


def _ensure(tars: list[str], cache: Path, model: Path) -> None:
    ensure_corpus(tars, cache, model, processes=1, shard_tokens=8_000)


def test_many_processes_that_want_raw_tars_share_one_corpus(prepared: Prepared, tmp_path: Path) -> None:
    import webdataset

    for part in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{part}.tar")) as tar:
            for i, text in enumerate(prepared.texts[part::2]):
                tar.write({"__key__": f"{i:06d}", "txt": text})
    cache, model = tmp_path / "cache", prepared.folder / "tokenizer.model"
    tars = [str(tmp_path / "{0..1}.tar")]
    ranks = [multiprocessing.get_context("fork").Process(target=_ensure, args=(tars, cache, model)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    (folder,) = cache.iterdir()
    before = (folder / "report.json").stat()
    assert ensure_corpus(tars, cache, model, processes=1, shard_tokens=8_000) == folder
    assert (folder / "report.json").stat() == before
    corpora = [Corpus(folder / split) for split in ("train", "validation")]
    texts = []
    for corpus in corpora:
        tokens, starts = corpus.read(0, corpus.tokens)
        edges = [0, *starts.tolist(), corpus.tokens]
        texts += [prepared.tokenizer.decode(tokens[a:b].tolist()) for a, b in itertools.pairwise(edges)]
    assert sorted(texts) == sorted(prepared.texts)
    with pytest.raises(DataError, match="not a tar"):
        ensure_corpus([str(prepared.source)], cache, model, processes=1)


def test_the_command(prepared: Prepared, tmp_path: Path) -> None:
    source, model = _source(prepared, tmp_path), prepared.folder / "tokenizer.model"
    program = "from triplane.launcher.cli import main; main()"
    command = [sys.executable, "-c", program, "prepare", str(source), "--out", str(tmp_path / "out")]
    command += ["--tokenizer", str(model), "--dedupe", "exact", "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exact duplicate" in done.stdout and "1,000" in done.stdout and "not JSON" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert "holds this corpus already" in again.stdout
