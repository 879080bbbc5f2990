"""The memory that `triplane prepare` takes at its peak, summed over its processes, whatever the input.

python benchmarks/prepare_memory.py [--megabytes 100] [--processes 1]
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from backports import zstd

_POLL_S = 0.02
_ENGLISH = "".join(f"The {i}th line of a long text tells of rivers, towns and {i % 97} ships.\n" for i in range(20_000))


def _write(path: Path, megabytes: int) -> None:
    with open(path, "w") as file:
        for start in range(0, megabytes * 1_000_000, len(_ENGLISH)):
            file.write(_ENGLISH[: megabytes * 1_000_000 - start])


def _english(folder: Path, megabytes: int) -> None:
    _write(folder / "x.txt", megabytes)


def _chinese(folder: Path, megabytes: int) -> None:
    line = "河流和城市的故事很长,而且没有人知道它的结局。\n"
    (folder / "x.txt").write_text(line * (megabytes * 1_000_000 // len(line.encode())))


def _one_line(folder: Path, megabytes: int) -> None:
    (folder / "x.txt").write_text(_ENGLISH.replace("\n", " ") * (megabytes * 1_000_000 // len(_ENGLISH)))


def _run(folder: Path, megabytes: int) -> None:
    (folder / "x.txt").write_text("a" * megabytes * 1_000_000)


def _json_row(folder: Path, megabytes: int) -> None:
    text = _ENGLISH * (min(megabytes, 60) * 1_000_000 // len(_ENGLISH))
    (folder / "x.jsonl").write_text(json.dumps({"text": text}))


def _gzip_bomb(folder: Path, megabytes: int) -> None:
    with gzip.open(folder / "x.txt.gz", "wb") as file:
        for _ in range(4 * megabytes):
            file.write(b"a b " * 250_000)


def _json_bomb(folder: Path, megabytes: int) -> None:
    with zstd.open(folder / "x.jsonl.zst", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(4 * megabytes):
            file.write(b"a b " * 250_000)


def _parquet_bomb(folder: Path, megabytes: int) -> None:
    import pyarrow
    import pyarrow.parquet

    values = pyarrow.array(["a b " * 12_500_000, "short"])  # one value of 50 MB, eight times
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1] * 8), values)})
    pyarrow.parquet.write_table(table, folder / "x.parquet", compression="zstd")


_INPUTS = {
    "English": _english,
    "Chinese": _chinese,
    "English without line ends": _one_line,
    "one character": _run,
    "a JSON row, at most 60 MB": _json_row,
    "gzip, four times as much when unpacked": _gzip_bomb,
    "zstd, a JSON row of four times as much": _json_bomb,
    "parquet, one value of 50 MB many times": _parquet_bomb,
}


def measured(command: list[str]) -> tuple[int, float, int]:
    """Exit status, seconds, and the peak in bytes of what its processes held at once."""
    begin, peak = time.monotonic(), 0
    program = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while program.poll() is None:
        peak = max(peak, sum(_resident(program)))
        time.sleep(_POLL_S)
    return program.returncode, time.monotonic() - begin, peak


def _resident(program: psutil.Process) -> Iterator[int]:
    try:
        for process in (program, *program.children(recursive=True)):
            yield process.memory_info().rss
    except psutil.NoSuchProcess:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    choices = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = folder / "small"
        small.mkdir()
        for i in range(200):
            (small / f"{i}.txt").write_text(_ENGLISH[60 * i : 60 * i + 4000])
        triplane = [sys.executable, "-m", "triplane"]
        model = str(folder / "t.model")
        train = [*triplane, "tokenizer", "train", str(small), "--out", model, "--vocab-size", "380"]
        subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
        print(f"| input of {choices.megabytes} MB | MiB at the peak | seconds |\n| --- | --- | --- |", flush=True)
        for number, (what, write) in enumerate(_INPUTS.items()):
            source = folder / str(number)
            source.mkdir()
            for path in small.iterdir():
                (source / path.name).symlink_to(path)
            write(source, choices.megabytes)
            command = [*triplane, "prepare", str(source), "--out", str(folder / f"out{number}"), "--tokenizer", model]
            status, seconds, peak = measured(
                [*command, "--validation-fraction", "0.3", "--processes", str(choices.processes)]
            )
            assert status == 0, what
            print(f"| {what} | {peak / 2**20:,.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
