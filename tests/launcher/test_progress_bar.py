"""The bars of long commands: numbers from the start, a clock that moves, and nothing but the result in a pipe."""

import io
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import triplane
from rich.console import Console
from small_corpora import Prepared

from triplane.data.prepare import Progress, prepare
from triplane.data.tokenizer_training import train_tokenizer
from triplane.launcher.progress_bar import PreparationBar, TokenizerBar


def terminal() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, legacy_windows=False)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_preparation_has_numbers_before_its_first_chunk(prepared: Prepared, tmp_path: Path) -> None:
    told: list[Progress] = []
    prepare(
        [str(prepared.source)],
        tmp_path / "out",
        prepared.tokenizer_path,
        validation_fraction=0.1,
        shard_tokens=40_000,
        processes=1,
        progress=told.append,
    )
    size = prepared.source.stat().st_size
    assert told[0] == Progress(documents=0, text_bytes=0, tokens=0, read_bytes=0, total_bytes=size)
    assert told[-1].documents == 1500 and told[-1].read_bytes == size
    console = terminal()
    with PreparationBar(console) as bar:
        for now in (told[0], told[-1]):
            bar.update(now)
            bar._bar.refresh()
    megabytes = f"{size / 1e6:.1f}"
    assert f"0 docs  0.0 of {megabytes} MB  0 tok/s" in shown(console)
    assert f"1,500 docs  {megabytes} of {megabytes} MB" in shown(console)


def test_the_clock_moves_while_a_tokenizer_trains(tmp_path: Path) -> None:
    draw, console = random.Random(1), terminal()
    words = ["".join(draw.choices("aeiounrst", k=draw.randint(4, 12))) for _ in range(40_000)]
    with TokenizerBar(console) as bar:
        bar.read(1_000_000, 3_000_000)
        bar._bar.refresh()

        def texts() -> Iterator[str]:
            yield from (" ".join(draw.choices(words, k=2000)) for _ in range(700))
            bar._bar.get_time = lambda: 20 * time.monotonic()  # a second to see in a twentieth
            bar.train()

        train_tokenizer(texts(), tmp_path / "a.model", vocab_size=2000)
        seconds = set(re.findall(r"0:00:\d\d", shown(console).partition("training the tokenizer")[2]))
        assert [task.total for task in bar._bar.tasks] == [None], "a bar that does not move, at 0 %"
    assert "1.0 of 3.0 MB" in shown(console)
    assert len(seconds) > 1


def test_a_pipe_gets_the_result_alone(prepared: Prepared, tmp_path: Path) -> None:
    result = triplane("tokenizer", "train", prepared.source, "--out", "a.model", "--vocab-size", 400, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("a.model: 400 tokens, lossless on every text\n", "")


@pytest.mark.parametrize("total", [2_000_000, None])
def test_input_of_unknown_size_has_no_total(total: int | None) -> None:
    console = terminal()
    with TokenizerBar(console) as bar:
        bar.read(1_000_000, total)
        bar._bar.refresh()
    assert ("1.0 of 2.0 MB" if total else "1.0 MB") in shown(console)
